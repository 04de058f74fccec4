"""The schema of a comparison: bases, arms, seeds, a budget, and what is tuned.

An arm is one training stage after another arm's model, or after the base. Its settings lie over the shared ``[sft]`` or
``[rl]`` table, so that arms differ in nothing that the recipe does not say::

    [arms.sft]
    kind = "sft"

    [arms.sft-then-rl]
    after = "sft"
    kind = "rl"
    grid = { lr = [1e-4, 2e-4, 4e-4] }   # tried on the dev split, chosen there, reported on the test split
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import resources
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from thence.compare.absolute import with_absolute_paths
from thence.compare.bases import Base, check_bases
from thence.compare.contrasts import Contrast, Covariate, Power, check_contrasts
from thence.compare.result import Column
from thence.compare.sections import read_section
from thence.errors import RecipeError, UserError
from thence.given_files import folder_place
from thence.names import same_file
from thence.recipe import Eval, Rl, Sft, build_recipe
from thence.settings.limits import Flops, Name, Place, Seed, Signed, Steps, Text, TokenBudget
from thence.settings.section import Section
from thence.settings.toml_file import TomlFile, read_toml
from thence.settings.validation import validated
from thence.wording import shown

TUNING_SEED = 100
MOST_TRIES = 1000


class ArmBudget(Section):
    """The budget of an arm and the arms before it, counted from the base. Training stops at the nearest step."""

    flops: Flops | None = None
    """FLOPs: 6N per trained token, 2N per sampled one and per token that a teacher scores, with N parameters."""
    tokens: TokenBudget | None = None
    """Trained tokens."""
    steps: Steps | None = None
    """Optimizer steps of SFT and rollout batches of RL."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in (self.flops, self.tokens, self.steps)) != 1:
            raise ValueError("give exactly one of flops, tokens and steps")
        return self

    @property
    def measure(self) -> str:
        """flops, tokens or steps."""
        return next(name for name in ("flops", "tokens", "steps") if getattr(self, name) is not None)

    @property
    def amount(self) -> float:
        """How much of it."""
        return getattr(self, self.measure)

    def __str__(self) -> str:
        units = {"flops": "FLOPs", "tokens": "trained tokens", "steps": "steps"}
        return f"{self.amount:.3g} {units[self.measure]}".replace("e+", "e")


class Tuning(Section):
    """How settings are chosen: on splits and seeds that are never reported."""

    seeds: list[Seed] = Field(default=[TUNING_SEED], min_length=1)
    """Seeds for tuning. They differ from the reported seeds."""
    eval: dict[str, Any] = {}
    """Changes to [eval] for tuning. The accuracy of a setting is the mean over its columns and seeds."""


class ArmTable(Section):
    """An arm: one training stage, or a base that is only measured."""

    title: Text = ""
    """Name of the arm in tables. Default: its key."""
    group: Text = ""
    """Heading of the arm in tables."""
    after: Text = ""
    """The arm whose model this arm starts from. Empty: the base."""
    kind: Literal["sft", "rl", ""] = ""
    """Kind of the training stage. Empty: nothing is trained, and the base is measured."""
    settings: dict[str, Any] = {}
    """Changes to the shared [sft] or [rl] table."""
    like: Text = ""
    """Another arm, whose tuned values this arm uses. This isolates a fault, at the settings of the clean arm."""
    grid: dict[str, list[Any]] = {}
    """Fields and values to tune. All combinations are tried."""
    budget: bool = True
    """Whether the comparison's budget ends this arm."""
    paper: dict[str, Signed] = {}
    """The paper's figures for this arm, by base. Tables show them."""
    note: Text = ""
    """One line for the reader."""

    @property
    def stages(self) -> list[str]:
        """Of the arm's recipe."""
        return [self.kind, "eval"] if self.kind else ["eval"]

    def candidates(self) -> list[dict[str, Any]]:
        """Every combination of the grid; one empty combination where there is no grid. Raises ValueError: too many."""
        if (tries := prod(map(len, self.grid.values()))) > MOST_TRIES:
            raise ValueError(f"{tries:,} combinations of values are more than anybody tries (at most {MOST_TRIES:,})")
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]


class ComparisonRecipe(Section):
    """A whole comparison."""

    name: Name = "comparison"
    """Name of the comparison and of its folder."""
    description: Text = ""
    """A line of description."""
    folder: Place | None = None
    """Folder of the comparison. Default: runs/<name>."""
    registered: bool = False
    """Write the design down before the first reported run. A later change of it is refused, or shown as amended."""
    reference: Text
    """The arm with which all others are compared."""
    seeds: list[Seed] = Field(min_length=1)
    """Seeds of the reported runs, for each base that has none of its own."""
    budget: ArmBudget | None = None
    """Budget of every arm. Default: every arm runs to its own end."""
    bases: dict[Name, Base] = Field(min_length=1)
    """Models to start from, by name."""
    arms: dict[Name, ArmTable] = Field(min_length=1)
    """The compared arms, by name."""
    tuning: Tuning = Tuning()
    data: dict[str, Any] = {}
    """As in a recipe, shared by all arms."""
    model: dict[str, Any] = {}
    """As in a recipe, without the path."""
    sft: dict[str, Any] = {}
    """As in a recipe, shared by all arms of the kind."""
    rl: dict[str, Any] = {}
    """As in a recipe, shared by all arms of the kind."""
    eval: dict[str, Any] = {}
    """The test sets on which arms are reported; the first split at the first temperature is the headline."""
    sections: list[dict[str, Any]] = []
    """Tables and figures of the report. Default: those that fit the arms."""
    covariate: Covariate | None = None
    """What tells blocks (a base with a seed) apart."""
    contrasts: list[Contrast] = []
    """Differences between arms that the comparison is to decide, over blocks."""
    power: Power | None = None
    """What `--power` assumes."""

    def path(self) -> Path:
        """The comparison's folder. Raises RecipeError where no folder can be."""
        path = Path(self.folder) if self.folder else Path("runs") / self.name
        return folder_place(path, "folder" if self.folder else "name")

    def seeds_of(self, base: str) -> list[int]:
        """The seeds of the reported runs from a base."""
        own = self.bases[base].seeds
        return self.seeds if own is None else own

    def blocks(self) -> list[tuple[str, int]]:
        """Every block, a base with a seed: seed by seed, and base by base for each."""
        own = (seed for base in self.bases for seed in self.seeds_of(base))
        order = dict.fromkeys([*self.seeds, *own])
        return [(base, seed) for seed in order for base in self.bases if seed in self.seeds_of(base)]

    def tuned_base(self, base: str) -> str:
        """The base whose tuning chooses the values that are used on a base."""
        return self.bases[base].tuned_on or base

    def lineage(self, arm: str) -> list[str]:
        """The arms from the base to this one."""
        table = self.arms[arm]
        return [*(self.lineage(table.after) if table.after else []), arm]

    def stage(self, arm: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The table of an arm's training stage, without a budget."""
        table = self.arms[arm]
        return {**(self.sft if table.kind == "sft" else self.rl), **table.settings, **chosen}

    def test(self) -> Eval:
        """The resolved [eval]. Raises RecipeError."""
        return validated(Eval, self.eval, "eval")

    def columns(self) -> tuple[Column, ...]:
        """What is reported: every split at every temperature. Raises RecipeError."""
        test = self.test()
        splits = test.splits or {test.data.get("split", "test"): {}}
        return tuple(Column(split, temperature) for temperature in test.temperatures for split in splits)


def shipped_comparisons() -> dict[str, Path]:
    """The comparisons that come with the package, by name."""
    folder = Path(str(resources.files("thence.compare") / "recipes"))
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def load_comparison(origin: str | Path | Mapping[str, Any]) -> ComparisonRecipe:
    """Read a comparison.

    Args:
        origin: a TOML file, the name of a shipped comparison, or the tables as a mapping. Data files that the tables
            name relatively are looked for from the working directory.

    Raises:
        RecipeError: an unknown key, a wrong type, or arms that cannot be run.
    """
    file = None if isinstance(origin, Mapping) else _read(origin)
    recipe = validated(
        ComparisonRecipe, dict(origin) if isinstance(origin, Mapping) else file.tables if file else {}, file=file
    )
    path = str(file.path) if file else None
    _check_folders(recipe, path)
    _check_names(recipe, path)
    check_bases(recipe.bases, recipe.seeds, any(arm.grid for arm in recipe.arms.values()), path)
    _check_stages(recipe, path)
    for i, section in enumerate(recipe.sections):
        read_section(section, recipe.arms, recipe.bases, where=f"sections.{i}")
    kinds = [section["kind"] for section in recipe.sections]
    named, blocks = (recipe.covariate, recipe.contrasts), len(recipe.blocks())
    check_contrasts(*named, recipe.arms, recipe.columns(), blocks, kinds, path)
    return with_absolute_paths(_with_columns(recipe))


def _with_columns(recipe: ComparisonRecipe) -> ComparisonRecipe:
    """The recipe whose covariate and contrasts name the headline where they named no column.

    Which test set that is follows from the order of the splits, and an order is not part of a registered design.
    """
    headline = {"column": recipe.columns()[0].split}
    contrasts = [one if one.column else one.model_copy(update=headline) for one in recipe.contrasts]
    covariate = recipe.covariate
    if covariate is not None and not covariate.column:
        covariate = covariate.model_copy(update=headline)
    return recipe.model_copy(update={"contrasts": contrasts, "covariate": covariate})


def _read(origin: str | Path) -> TomlFile:
    try:
        return read_toml(shipped_comparisons().get(str(origin), Path(origin)), "a comparison")
    except (FileNotFoundError, NotADirectoryError):
        names = ", ".join(shipped_comparisons())
        raise RecipeError(
            f"no comparison {shown(str(origin))}", remedy=f"give a TOML file, or one of: {names}"
        ) from None


def _check_folders(recipe: ComparisonRecipe, file: str | None) -> None:
    """Arms, bases and seeds have a folder each."""
    for field, names in (("arms", recipe.arms), ("bases", recipe.bases)):
        if twice := same_file(names):
            raise RecipeError(
                f"{' and '.join(map(repr, twice))} would share a folder",
                remedy="give each its own name; capitals alone do not tell two apart",
                file=file,
                field=field,
            )
    own = [(f"bases.{name}.seeds", base.seeds) for name, base in recipe.bases.items() if base.seeds is not None]
    for field, seeds in (("seeds", recipe.seeds), ("tuning.seeds", recipe.tuning.seeds), *own):
        if len(set(seeds)) < len(seeds):
            raise RecipeError(
                f"a seed is given twice: {seeds}",
                remedy="a run counts once: give each seed once",
                file=file,
                field=field,
            )


def _check_names(recipe: ComparisonRecipe, file: str | None) -> None:
    def refuse(problem: str, field: str) -> RecipeError:
        return RecipeError(problem, remedy=f"arms are: {', '.join(recipe.arms)}", file=file, field=field)

    if recipe.reference not in recipe.arms:
        raise refuse(f"no arm {recipe.reference!r}", "reference")
    for name, arm in recipe.arms.items():
        for field, other in (("after", arm.after), ("like", arm.like)):
            if other and other not in recipe.arms:
                raise refuse(f"no arm {other!r}", f"arms.{name}.{field}")
        seen, at = {name}, arm.after
        while at:
            if at in seen:
                raise refuse("the arm comes after itself", f"arms.{name}.after")
            seen.add(at)
            at = recipe.arms[at].after
        if arm.grid and arm.like:
            raise refuse("an arm has a grid, or is tuned like another", f"arms.{name}.like")
        if arm.like and (recipe.arms[arm.like].like or recipe.arms[arm.like].kind != arm.kind):
            raise refuse("`like` names an arm of the same kind with its own settings", f"arms.{name}.like")
        if not arm.kind and (arm.settings or arm.grid or arm.after):
            raise refuse("an arm that trains has a kind: sft or rl", f"arms.{name}.kind")
        if any(not values for values in arm.grid.values()):
            raise refuse("nothing to try", f"arms.{name}.grid")
        try:
            arm.candidates()
        except ValueError as error:
            raise RecipeError(str(error), remedy="give fewer values", file=file, field=f"arms.{name}.grid") from None
    tuned = any(arm.grid for arm in recipe.arms.values())
    if tuned and {seed for _, seed in recipe.blocks()} & set(recipe.tuning.seeds):
        raise RecipeError(
            "a seed is tuned on and reported", remedy="give tuning its own seeds", file=file, field="tuning.seeds"
        )


def _check_stages(recipe: ComparisonRecipe, file: str | None) -> None:
    """Every stage with every value of its grid makes a recipe, or an error that names the arm."""
    for name, chosen, tables in all_stages(recipe):
        try:
            build_recipe(tables)
        except UserError as error:
            raise RecipeError(
                f"{error.problem}{f' (with {chosen})' if chosen else ''}",
                remedy=error.remedy,
                file=file,
                field=f"arms.{name}: {error.field}" if error.field else f"arms.{name}",
            ) from None


def all_stages(recipe: ComparisonRecipe) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Of every arm and value of its grid: its name, the value, and a recipe's tables with its stage."""
    for name, arm in recipe.arms.items():
        for chosen in arm.candidates():
            tables: dict[str, Any] = {
                "stages": arm.stages,
                "model": {**recipe.model, "path": "base"},
                "data": recipe.data,
                "eval": recipe.eval,
            }
            if arm.kind:
                tables[arm.kind] = recipe.stage(name, chosen)
            yield name, chosen, tables


def check_methods(recipe: ComparisonRecipe) -> None:
    """Refuse an arm whose method, options or fault do not exist or do not go with its stage.

    Raises:
        UserError: the first that is wrong, with the arm.
    """
    from thence.methods.registry import stage_method  # needs torch, which reading a comparison does not wait for
    from thence.pipeline.context import step_of

    for name, _, tables in all_stages(recipe):
        if kind := recipe.arms[name].kind:
            stage = build_recipe(tables).stage(kind)
            assert isinstance(stage, Sft | Rl)
            try:
                stage_method(stage, kind)
                step_of(kind, stage)
            except UserError as error:
                error.rename_field(f"arms.{name}: {error.field}")
                raise

"""The typed schema of recipes: one source for TOML files, Python and command-line flags.

A recipe names its stages in order; the part of a stage's name before the first ``-`` is its kind, and the table of
the kind is the default of every stage of that kind::

    stages = ["eval-base", "sft", "eval-sft", "rl", "eval-rl"]
    [eval]          # holds for the three evaluations
    [eval-base]     # would override [eval] for the first one

Nothing here imports torch, so that ``thence --help`` and ``--dry-run`` of a typo answer at once.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field

from thence.errors import RecipeError, UserError
from thence.given_files import folder_place
from thence.limits import Name, Place, Seed, Text, shown
from thence.names import RULE, bad_name, same_file
from thence.overrides import lay_over
from thence.section import Section, fields_of, validated
from thence.stages import KINDS, Data, Eval, Faulty, Model, Optimization, Rl, Sft, kind_of
from thence.text_values import field_type, read_value
from thence.toml import TomlFile, read_toml

__all__ = [
    "KINDS", "Data", "Eval", "Faulty", "Model", "Optimization", "Recipe", "Rl", "Section", "Sft", "apply_overrides",
    "build_recipe", "kind_of", "load_recipe", "naming_fields_of", "read_recipe_file", "read_tables",
    "shipped_recipes", "type_of",
]  # fmt: skip


class Recipe(Section):
    """A whole run: a model and the stages it goes through."""

    name: Name = "run"
    """Names the run's folder."""
    description: Text = ""
    """One line, shown by `thence recipes`."""
    seed: Seed = 0
    """Every random number of the run follows from it."""
    folder: Place | None = None
    """Run folder; default: runs/<name>-seed<seed>."""
    stages: list[Name] = ["sft", "rl", "eval"]
    """Names in order; the part before the first `-` is the kind: sft, rl or eval."""
    model: Model
    data: Data = Data()
    tables: dict[str, Sft | Rl | Eval] = Field(default={}, exclude=True)
    """The resolved table of every stage; filled from the tables of the file."""

    def stage(self, name: str) -> Sft | Rl | Eval:
        """The resolved settings of a stage."""
        return self.tables[name]

    def stage_data(self, overrides: Mapping[str, Any], where: str = "data") -> Data:
        """[data] with a stage's overrides laid over it. Raises RecipeError; ``where`` names the overrides in it."""
        return validated(Data, {**self.data.model_dump(), **overrides}, where)

    def run_folder(self) -> Path:
        """Where the run keeps everything. Raises RecipeError where no folder can be."""
        path = Path(self.folder) if self.folder else Path("runs") / f"{self.name}-seed{self.seed}"
        return folder_place(path, "folder" if self.folder else "name")

    def resolved(self) -> dict[str, Any]:
        """The recipe as nested plain values: what is written to the run folder, and loads to the same recipe.

        ``max_tokens`` is in it only where it was set: one that was not gives way to the model's context.
        """
        plain = self.model_dump(mode="json", exclude_none=True)
        for name, stage in self.tables.items():
            unset = {"max_tokens"} - stage.model_fields_set
            plain[name] = stage.model_dump(mode="json", exclude_none=True, exclude=unset)
        return plain

    def same_as(self, other: Recipe) -> bool:
        """Whether every setting is the same, set or left at its default."""
        tables = [{name: stage.model_dump() for name, stage in recipe.tables.items()} for recipe in (self, other)]
        return self.model_dump() == other.model_dump() and tables[0] == tables[1]


def load_recipe(origin: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        origin: a TOML file, the name of a shipped recipe, or the tables as a mapping.
        overrides: dotted names to values, for example ``{"sft.lr": 2e-5}``; strings are parsed as TOML values.

    Raises:
        RecipeError: unknown recipe or key, wrong type or a combination that makes no sense.
    """
    file = None if isinstance(origin, Mapping) else read_recipe_file(origin)
    tables = dict(origin) if isinstance(origin, Mapping) else file.tables if file else {}
    given = overrides or {}
    try:
        return build_recipe(apply_overrides(tables, given), file=file)
    except RecipeError as error:
        field = error.field or ""
        set_by = next((name for name in given if _same_field(name, field)), None)
        if set_by is None:
            raise
        # the value comes from the command line or from Python, whatever the file says
        table, dot, rest = set_by.partition(".")
        flag = f"--{table}{dot}{rest.replace('-', '_')}"
        raise RecipeError(error.problem, remedy=error.remedy, field=flag) from None


def _same_field(flag: str, field: str) -> bool:
    """Whether a dotted flag sets the field that an error names, or what lies in it."""
    flat, wrong = flag.replace("-", "_"), field.replace("-", "_")
    stage, _, rest = wrong.partition(".")
    kinds = [wrong, f"{stage.split('_', 1)[0]}.{rest}"] if rest else [wrong]
    return any(name == flat or name.startswith(f"{flat}.") or flat.startswith(f"{name}.") for name in kinds)


def build_recipe(tables: Mapping[str, Any], file: TomlFile | str | None = None) -> Recipe:
    """Validate nested plain values into a recipe. Raises RecipeError."""
    path = file.path if isinstance(file, TomlFile) else file
    line = file.line_of("stages") if isinstance(file, TomlFile) else None
    stages = tables.get("stages", Recipe.model_fields["stages"].default)
    if not isinstance(stages, list) or not stages or not all(isinstance(s, str) for s in stages):
        raise RecipeError(
            f"stages is not a list of names (got {shown(stages)})",
            remedy='write stages = ["sft", "rl"]',
            file=path,
            line=line,
            field="stages",
        )
    if (problem := _wrong_stages(stages)) is not None:
        raise RecipeError(problem[0], remedy=problem[1], file=path, line=line, field="stages")
    resolved = {}
    for name in stages:
        kind = kind_of(name)
        table = {**_table(tables, kind, file), **_table(tables, name, file)}
        resolved[name] = validated(KINDS[kind], table, name, file=file, under=kind)
    own = {key: value for key, value in tables.items() if key not in KINDS and key not in stages}
    if "tables" in own:
        raise RecipeError(
            "unknown key", remedy=f"fields are: {', '.join(fields_of(Recipe, ()))}", file=path, field="tables"
        )
    recipe = validated(Recipe, own, file=file, known=[*KINDS, *stages])
    for name, stage in resolved.items():
        _check_data(recipe, name, stage, file)
    return recipe.model_copy(update={"tables": resolved})


def _wrong_stages(stages: Sequence[str]) -> tuple[str, str] | None:
    """What is wrong with the names of stages, and what to do; None: nothing."""
    for name in stages:
        if kind_of(name) not in KINDS:
            remedy = f"begin its name with one of {', '.join(KINDS)}, for example sft-short"
            if all(kind_of(part) in KINDS for part in name.split(",")) and "," in name:
                remedy = (
                    "a list is written " + "--stages '[" + ", ".join(f'"{part}"' for part in name.split(",")) + "]'"
                )
            return f"stage {shown(name)} has no kind", remedy
        if wrong := bad_name(name):
            return f"stage {shown(name)} cannot have a folder: {wrong}", RULE
    if twice := same_file(stages):
        return (
            f"a stage is named twice: {' and '.join(map(repr, twice))} would share a folder",
            "give each its own name, for example eval-base; capitals alone do not tell two apart",
        )
    return None


def _check_data(recipe: Recipe, name: str, stage: Sft | Rl | Eval, file: TomlFile | str | None) -> None:
    """Every table that a stage lays over [data], and the names of its test sets."""
    kind = kind_of(name)
    tables = {"data": stage.data}
    if isinstance(stage, Eval):
        tables |= {f"splits.{split}": {**stage.data, **table} for split, table in stage.splits.items()}
    for place, table in tables.items():
        values = {**recipe.data.model_dump(), **table}
        validated(Data, values, f"{name}.{place}", file=file, under=f"{kind}.{place}")
    if not isinstance(stage, Eval):
        return
    split = str({"split": "test", **stage.data}["split"])
    path = file.path if isinstance(file, TomlFile) else file
    if twice := same_file(list(stage.splits)):
        raise RecipeError(
            f"{' and '.join(map(repr, twice))} would share a file",
            remedy="give each test set its own name; capitals alone do not tell two apart",
            file=path,
            field=f"{name}.splits",
        )
    if not stage.splits and (wrong := bad_name(split)):
        raise RecipeError(
            f"a test set that has no name is called after its split, and {wrong}",
            remedy=f"name it: [{name}] splits = {{ mine = {{ split = {json.dumps(split)} }} }}",
            file=path,
            field=f"{name}.data.split",
        )


def apply_overrides(tables: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Lay dotted names over nested tables; ``-`` in a field's name counts as ``_``. Returns a new mapping.

    A text is read by the type of its field: see :func:`thence.text_values.read_value`.
    """
    values = {
        name: read_value(value, type_of(name)) if isinstance(value, str) else value for name, value in overrides.items()
    }
    if "stages" in values:
        tables = _with_stages(tables, values.pop("stages"))
    if "model.path" in values and isinstance(model := tables.get("model"), Mapping):
        # a model is named by its path or made at random: the flag for one takes the place of the other
        tables = {**tables, "model": {key: value for key, value in model.items() if key != "init"}}
    stages = tables.get("stages", Recipe.model_fields["stages"].default)
    return lay_over(tables, values, stages if isinstance(stages, list) else ())


def type_of(dotted: str) -> Any:
    """The annotation of the field with this dotted name; Any where it is not known."""
    table, *path = dotted.split(".")
    path = [part.replace("-", "_") for part in path]
    if kind_of(table) not in KINDS or not path:
        return field_type(Recipe, [table.replace("-", "_"), *path])
    # the tables `data` and `splits` of a stage are laid over [data]
    below = path[1:] if path[0] == "data" else path[2:] if path[0] == "splits" else []
    return field_type(Data, below) if below else field_type(KINDS[kind_of(table)], path)


def _with_stages(tables: Mapping[str, Any], stages: Any) -> dict[str, Any]:
    """The tables with other stages; the table of a stage that is no longer run goes with it."""
    before = tables.get("stages", [])
    gone = {name for name in before if name not in stages and name not in KINDS} if isinstance(stages, list) else set()
    return {key: value for key, value in tables.items() if key not in gone} | {"stages": stages}


@contextmanager
def naming_fields_of(name: str, stage: Sft | Rl | Eval) -> Iterator[None]:
    """While it lasts, a UserError that names a field of the stage's table (`reward`) names it in full (`rl.reward`)."""
    try:
        yield
    except UserError as error:
        if error.field is not None and error.field.partition(".")[0] in type(stage).model_fields:
            error.rename_field(f"{name}.{error.field}")
        raise


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("thence") / "recipes"))
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def read_recipe_file(origin: str | Path) -> TomlFile:
    """A TOML file or a shipped recipe, not validated. Raises RecipeError."""
    shipped = shipped_recipes()
    try:
        return read_toml(shipped.get(str(origin), Path(origin)), "a recipe")
    except (FileNotFoundError, NotADirectoryError):
        near = difflib.get_close_matches(str(origin), shipped, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RecipeError(
            f"no recipe {shown(str(origin))}",
            remedy=f"{hint}`thence recipes` lists the shipped ones; or give a TOML file",
        ) from None


def read_tables(origin: str | Path) -> tuple[str, dict[str, Any]]:
    """The path and the plain tables of a TOML file or a shipped recipe, not validated. Raises RecipeError."""
    file = read_recipe_file(origin)
    return str(file.path), file.tables


def _table(tables: Mapping[str, Any], name: str, file: TomlFile | str | None) -> dict[str, Any]:
    table = tables.get(name, {})
    if not isinstance(table, Mapping):
        path, line = (file.path, file.line_of(name)) if isinstance(file, TomlFile) else (file, None)
        raise RecipeError(
            f"not a table (got {shown(table)})", remedy=f"write [{name}]", file=path, line=line, field=name
        )
    return dict(table)

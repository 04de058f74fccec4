"""From a comparison's file to its design: all that decides what is run and how it is judged, in a form to be hashed.

Names, descriptions, titles, notes, sections and the folder are not in it. Files enter by the hash of their content, and
a recipe that pretrains a base by the hash of what it trains, so that they may be moved but not changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from thence.compare.bases import Base, pretraining_recipe
from thence.compare.collect import collect
from thence.compare.plan import PlannedRun, Planner
from thence.compare.recipe import ComparisonRecipe
from thence.compare.registration import (
    Amendment,
    FieldChange,
    Registration,
    differences_of,
    quoted,
    sha256_of,
)
from thence.compare.result import RESULTS, SUMMARY, read_results, write_results
from thence.errors import UserError
from thence.pipeline.folder import git_commit
from thence.redaction import redacted_values
from thence.train.run_models import BASE, base_of_run, find_trained, run_of

_FOR_THE_READER = {"name", "description", "folder", "sections", "registered"}
_OF_ITEMS = {"title", "group", "note", "paper"}
"""Fields of an arm, of the covariate and of a contrast that only the reader sees."""
_PATHS = {"source", "template", "path", "tokenizer", "reward", "environment", "pilot"}
"""Fields that may name a file, wherever they stand."""
_MODELS = {"path", "tokenizer"}
"""Those that may name what a run has trained."""
_DIGITS = 16
_SHOWN = 12  # fields that an error lists


def design_of(recipe: ComparisonRecipe, sparse: bool = False) -> dict[str, Any]:
    """The design as plain values.

    Args:
        sparse: without what is at its default.

    Raises:
        RecipeError: a recipe that pretrains a base is not there, or makes no sense.
    """
    plain = recipe.model_dump(mode="json", exclude_none=True, exclude_defaults=sparse)
    design = {key: value for key, value in plain.items() if key not in _FOR_THE_READER}
    design["arms"] = {name: _judged(arm) for name, arm in design["arms"].items()}
    design |= {key: _judged(design[key]) for key in ("covariate",) if key in design}
    design |= {key: [_judged(each) for each in design[key]] for key in ("contrasts",) if key in design}
    design = _with_contents(design)
    for name, base in recipe.bases.items():
        if base.recipe is not None:
            design["bases"][name]["recipe"] = _recipe_content(base)
        elif "{seed}" in str(base.path):
            design["bases"][name]["path"] = _contents_by_seed(str(base.path), _seeds_that_start(recipe, name))
    return redacted_values(design)


def _seeds_that_start(recipe: ComparisonRecipe, base: str) -> list[int]:
    """The seeds that may start from a base, those of tuning included."""
    tuned = any(arm.grid for arm in recipe.arms.values()) and recipe.tuned_base(base) == base
    return [*recipe.seeds_of(base), *(recipe.tuning.seeds if tuned else ())]


def _contents_by_seed(path: str, seeds: Iterable[int]) -> str | dict[str, str]:
    """The content of each seed's model; the path itself where none is a folder or a run's."""
    paths = {str(seed): path.replace("{seed}", str(seed)) for seed in seeds}
    contents = {seed: _content(name, "path") for seed, name in paths.items()}
    return path if contents == paths else contents


def _judged(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in _OF_ITEMS}


def _recipe_content(base: Base) -> str:
    """A recipe's name, and the hash of all of it that a pretraining uses; the base's settings are named beside."""
    tables = pretraining_recipe(base.model_copy(update={"settings": {}}))
    used = {key: value for key, value in tables.items() if key not in {"name", "description", "folder", "trackers"}}
    stages = {*tables["stages"], "sft", "rl", "model", "data", "sharding"}
    used = {key: value for key, value in used.items() if not isinstance(value, Mapping) or key in stages}
    return f"{Path(str(base.recipe)).name} sha256:{sha256_of(_with_contents(used))[:_DIGITS]}"


def _with_contents(value: Any, field: str = "") -> Any:
    """Plain values in which every name of a file is its last part with the hash of its content."""
    if isinstance(value, Mapping):
        if field == "rewards":
            return {_content(str(name)): weight for name, weight in value.items()}
        return {key: _with_contents(inner, str(key).rpartition(".")[2]) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_contents(inner, field) for inner in value]
    return _content(value, field) if isinstance(value, str) and field in _PATHS else value


def _content(name: str, field: str = "") -> str:
    """The last name of a file, a folder or a run's model with a hash of its content; any other name as it is."""
    if not name:  # the path of nothing would be the current folder
        return name
    try:
        if (path := Path(name).expanduser()).exists():
            return f"{path.name} sha256:{_hash(path)}"
        file, colon, function = name.rpartition(":")
        if colon and (path := Path(file).expanduser()).is_file():  # FILE.py:FUNCTION
            return f"{path.name} sha256:{_hash(path)}:{function}"
        if field in _MODELS and (model := _model_of_a_run(name)) is not None:  # RUN:STAGE@STEP
            return f"{Path(name).name} sha256:{_hash(model)}"
    except OSError:  # too long for a name: a template's text
        pass
    return name


def _model_of_a_run(name: str) -> Path | None:
    """The folder of the weights that a run has trained, or started from; None: the name is no run's, or it has none."""
    try:
        if name.endswith(f":{BASE}"):
            start = base_of_run(name)
            return Path(start).expanduser() if start is not None and Path(start).expanduser().is_dir() else None
        return find_trained(name).folder if run_of(name)[0] is not None else None
    except UserError:
        return None


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]:
        with file.open("rb") as content:
            own = hashlib.file_digest(content, "sha256").hexdigest()
        digest.update(f"{file.relative_to(path).as_posix() if path.is_dir() else ''} {own}\n".encode())
    return digest.hexdigest()[:_DIGITS]


def changes_since(registration: Registration, recipe: ComparisonRecipe) -> tuple[FieldChange, ...]:
    """The fields in which a comparison's file differs from its registered design.

    A field that the design does not have and that stands at its default is none: a later version may have new fields.
    """
    now, given = design_of(recipe), design_of(recipe, sparse=True)
    set_here = {change.field for change in differences_of({}, given)}
    found, known = differences_of(registration.in_force, now), registration.in_force
    added = tuple(  # an arm or a base is new even if all its fields stand at their defaults
        f"{kind}.{quoted(name)}." for kind in ("arms", "bases") for name in now[kind] if name not in known.get(kind, {})
    )
    return tuple(c for c in found if c.old is not None or c.field in set_here or c.field.startswith(added))


def registered(planner: Planner, amend: str = "") -> Registration | None:
    """The registration that holds for what is about to be done; None: none is there yet.

    Args:
        amend: why the design is changed; empty: it is not.

    Raises:
        UserError: the design is not the registered one, and nothing says why; or there is nothing to amend; or the file
            asks for a registration, and reported runs were finished before there was one.
    """
    recipe, path, amend = planner.recipe, planner.folder / RESULTS, amend.strip()
    kept = read_results(planner.folder).registration if path.exists() else None
    if kept is None:
        if amend:
            raise UserError(
                "nothing is registered yet, so there is nothing to amend", remedy="leave it out", field="--amend"
            )
        if recipe.registered and (finished := finished_runs(planner)):
            runs = "1 reported run was" if finished == 1 else f"{finished} reported runs were"
            raise UserError(
                f"{runs} finished before the design was registered",
                remedy="give a new --folder, so that the registration comes first; or leave out registered = true",
                file=path,
                field="registered",
            )
        return None
    changes = changes_since(kept, recipe)
    if not changes:
        if amend:
            raise UserError("the design is as it was registered", remedy="leave it out", field="--amend")
        return kept
    if not amend:
        raise _altered(kept, changes, path)
    design = design_of(recipe)
    own = differences_of(kept.in_force, design)
    finished = finished_runs(planner)
    amendment = Amendment(_now(), amend, git_commit() or "", finished, own, design, sha256_of(design))
    return replace(kept, amendments=(*kept.amendments, amendment))


def finished_runs(planner: Planner) -> int:
    """How many reported runs are finished, whatever their settings: those with a folder, and those of the results."""
    folder, found, blocks = planner.folder, set(), set(planner.recipe.blocks())
    if (folder / RESULTS).exists():
        kept = read_results(folder)
        found, blocks = {run.folder for run in kept.runs}, blocks | set(kept.blocks)
    for base, seed in blocks:
        summaries = (folder / "runs" / base / f"seed{seed}").glob(f"*/{SUMMARY}")
        found |= {str(summary.parent.relative_to(folder)) for summary in summaries}
    return len(found)


class Registrar:
    """Sees to it that a design is registered before its first reported run, and that it is the registered one.

    Args:
        planner: of the comparison.
        amend: why the design was changed since; empty: it was not.

    Raises:
        UserError: as :func:`registered`.
    """

    def __init__(self, planner: Planner, amend: str = ""):
        self.planner, self.blocks = planner, set(planner.recipe.blocks())
        self.kept = registered(planner, amend)
        if amend.strip() and self.kept is not None:
            self._write(self.kept)

    @property
    def is_due(self) -> bool:
        """Whether the next reported run brings a registration."""
        return self.planner.recipe.registered and self.kept is None

    def is_reported(self, run: PlannedRun) -> bool:
        """Whether a run is one that the report shows, and neither of tuning nor a pretraining."""
        return bool(run.arm) and (run.base, run.seed) in self.blocks

    def before(self, run: PlannedRun) -> None:
        """Register the design if this run is the first that is reported."""
        if self.is_due and self.is_reported(run):
            self.register()

    def register(self) -> Registration:
        """Write the registration, if there is none."""
        if self.kept is None:
            design = design_of(self.planner.recipe)
            self.kept = Registration(_now(), git_commit() or "", sha256_of(design), design)
            self._write(self.kept)
        return self.kept

    def _write(self, registration: Registration) -> None:
        write_results(self.planner.folder, replace(collect(self.planner), registration=registration))


def _altered(kept: Registration, changes: tuple[FieldChange, ...], path: Path) -> UserError:
    listed = "; ".join(map(str, changes[:_SHOWN]))
    more = f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
    return UserError(
        f"the design is not the one that was registered on {kept.time} ({kept.sha256_in_force[:12]}). "
        f"It differs in {listed}{more}",
        remedy='give the values that were registered; or say why they change: --amend "REASON", which the report shows',
        file=path,
        field="registered",
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

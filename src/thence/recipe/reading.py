"""Reading a recipe: a file or mapping, with flags laid over it, becomes a :class:`thence.recipe.schema.Recipe`.

A recipe names its stages in order; the part of a stage's name before the first ``-`` is its kind, and the table of
the kind is the default of every stage of that kind::

    stages = ["eval-base", "sft", "eval-sft", "rl", "eval-rl"]
    [eval]          # holds for the three evaluations
    [eval-base]     # would override [eval] for the first one
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from thence.errors import RecipeError, UserError
from thence.names import RULE, bad_name, same_file
from thence.recipe.beside import beside
from thence.recipe.overrides import apply_overrides
from thence.recipe.schema import KINDS, Eval, Recipe, Rl, Sft, kind_of
from thence.recipe.tables import Data
from thence.settings.annotations import fields_of
from thence.settings.toml_file import TomlFile, read_toml
from thence.settings.validation import validated
from thence.wording import shown


def load_recipe(origin: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        origin: a TOML file, the name of a shipped recipe, or the tables as a mapping.
        overrides: dotted names to values, for example ``{"sft.lr": 2e-5}``; strings are parsed as TOML values.

    Raises:
        RecipeError: unknown recipe or key, wrong type or a combination that makes no sense.
    """
    file = None if isinstance(origin, Mapping) else read_recipe_file(origin)
    tables = dict(origin) if isinstance(origin, Mapping) else _tables_of(file) if file else {}
    given = overrides or {}
    try:
        return build_recipe(apply_overrides(tables, given), file=file)
    except RecipeError as error:
        field = error.field or ""
        set_by = next((name for name in given if _same_field(name, field)), None)
        if set_by is None:
            raise
        # the value comes from the command line or from Python, whatever the file says
        raise RecipeError(error.problem, remedy=error.remedy, field=f"--{set_by}") from None


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
            f"must be a list of names, not {shown(stages)}",
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
        own = _table(tables, name, file)
        table = {**_table(tables, kind, file), **own}
        resolved[name] = validated(KINDS[kind], table, name, file=file, under=kind, own=own)
    own = {key: value for key, value in tables.items() if key not in KINDS and key not in stages}
    if "tables" in own:
        raise RecipeError(
            "unknown key", remedy=f"fields are: {', '.join(fields_of(Recipe))}", file=path, field="tables"
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


def _tables_of(file: TomlFile) -> dict[str, Any]:
    """The tables of a file, with paths that hold from the current folder. A shipped recipe has no files beside it."""
    return file.tables if file.path in shipped_recipes().values() else beside(file)


def read_tables(origin: str | Path) -> tuple[str, dict[str, Any]]:
    """The path and the plain tables of a TOML file or a shipped recipe, not validated. Raises RecipeError."""
    file = read_recipe_file(origin)
    return str(file.path), _tables_of(file)


def _table(tables: Mapping[str, Any], name: str, file: TomlFile | str | None) -> dict[str, Any]:
    table = tables.get(name, {})
    if not isinstance(table, Mapping):
        path, line = (file.path, file.line_of(name)) if isinstance(file, TomlFile) else (file, None)
        raise RecipeError(
            f"must be a table, not {shown(table)}", remedy=f"write [{name}]", file=path, line=line, field=name
        )
    return dict(table)

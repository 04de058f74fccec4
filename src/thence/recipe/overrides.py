"""Dotted names laid over the tables of a recipe: what a flag sets in a file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from thence.errors import RecipeError
from thence.recipe.schema import KINDS, Data, Recipe, kind_of
from thence.settings.annotations import type_at
from thence.settings.text_values import read_value

DEEPEST = 64
"""Tables and lists in each other."""


def apply_overrides(tables: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Lay dotted names over nested tables; ``-`` in a field's name counts as ``_``. Returns a new mapping.

    A text is read by the type of its field: see :func:`thence.settings.text_values.read_value`.
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
        return type_at(Recipe, [table.replace("-", "_"), *path])
    # the tables `data` and `splits` of a stage are laid over [data]
    below = path[1:] if path[0] == "data" else path[2:] if path[0] == "splits" else []
    return type_at(Data, below) if below else type_at(KINDS[kind_of(table)], path)


def _with_stages(tables: Mapping[str, Any], stages: Any) -> dict[str, Any]:
    """The tables with other stages; the table of a stage that is no longer run goes with it."""
    before = tables.get("stages", [])
    gone = {name for name in before if name not in stages and name not in KINDS} if isinstance(stages, list) else set()
    return {key: value for key, value in tables.items() if key not in gone} | {"stages": stages}


def lay_over(tables: Mapping[str, Any], values: Mapping[str, Any], dashed: Collection[str] = ()) -> dict[str, Any]:
    """Lay dotted names over nested tables. Returns a new mapping.

    Args:
        dashed: tables that keep the dashes of their names; in a field's name a dash stands for an underscore.

    Raises:
        RecipeError: something between the dots is no table, or no name stands there.
    """
    result = copied(tables)
    for dotted, value in values.items():
        node, parts = result, dotted.split(".")
        if not all(parts):
            raise RecipeError("a name is empty", remedy="write --table.field", field=f"--{dotted}")
        for i, part in enumerate(parts):
            name = part if part in node or (i == 0 and part in dashed) else part.replace("-", "_")
            if i == len(parts) - 1:
                node[name] = value
                break
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise RecipeError(f"{part} is not a table", remedy="name a field of the recipe", field=f"--{dotted}")
    return result


def copied(value: Any, depth: int = 0) -> Any:
    """Nested plain values whose tables and lists are new ones. Raises RecipeError where they are nested too deep."""
    if depth > DEEPEST:
        raise RecipeError("tables lie too deep in each other", remedy=f"nest at most {DEEPEST}")
    if isinstance(value, Mapping):
        return {key: _named(key, inner, depth) for key, inner in value.items()}
    return [copied(inner, depth + 1) for inner in value] if isinstance(value, list) else value


def _named(key: Any, inner: Any, depth: int) -> Any:
    try:
        return copied(inner, depth + 1)
    except RecipeError as error:
        field = f"{key}.{error.field}" if depth == 0 else str(key)  # the first two keys are enough
        raise RecipeError(error.problem, remedy=error.remedy, field=field) from None

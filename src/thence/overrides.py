"""Dotted names laid over nested tables: what a flag sets in a file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from thence.errors import RecipeError

DEEPEST = 64
"""Tables and lists in each other."""


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

"""Dotted names laid over nested tables: what a flag sets in a file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from thence.errors import RecipeError


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


def copied(value: Any) -> Any:
    """Nested plain values whose tables and lists are new ones."""
    if isinstance(value, Mapping):
        return {key: copied(inner) for key, inner in value.items()}
    return [copied(inner) for inner in value] if isinstance(value, list) else value

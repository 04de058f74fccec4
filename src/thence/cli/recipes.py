"""``thence recipes``."""

from __future__ import annotations

from collections.abc import Sequence

from thence.cli.arguments import only, take_apart
from thence.errors import UserError
from thence.recipe import load_recipe, shipped_recipes


def recipes_command(argv: Sequence[str]) -> int:
    """List the shipped recipes, or print one's file."""
    found = take_apart(argv, {})
    if found.help:
        print("thence recipes [NAME]\n\nList the shipped recipes, or print one's file.")
        return 0
    shipped = shipped_recipes()
    if found.positional:
        name = only(found.positional, "thence recipes prints one recipe", "`thence recipes` lists them")
        if name not in shipped:
            raise UserError(f"no shipped recipe {name!r}", remedy=f"use one of {', '.join(shipped)}")
        print(shipped[name].read_text(encoding="utf-8"), end="")
        return 0
    width = max(map(len, shipped))
    for name in shipped:
        recipe = load_recipe(name)
        print(f"{name:<{width}}  {recipe.description}\n{'':<{width}}  stages: {', '.join(recipe.stages)}")
    print("\n`thence recipes NAME` prints one; `thence run NAME --dry-run` says what it costs.")
    return 0

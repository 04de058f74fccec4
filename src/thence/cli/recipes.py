"""``thence recipes``."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from thence.errors import UserError
from thence.recipe import load_recipe, shipped_recipes


def recipes_command(name: Annotated[str | None, Parameter(completer=lambda _: [*shipped_recipes()])] = None, /) -> int:
    """List the recipes that come with thence, or print the file of one.

    Examples:

      thence recipes
      thence recipes quickstart > mine.toml

    Args:
        name: The recipe to print.
    """
    shipped = shipped_recipes()
    if name is not None:
        if name not in shipped:
            raise UserError(f"no shipped recipe {name!r}", remedy=f"use one of {', '.join(shipped)}")
        print(shipped[name].read_text(encoding="utf-8"), end="")
        return 0
    width = max(map(len, shipped))
    for name in shipped:
        recipe = load_recipe(name)
        print(f"{name:<{width}}  {recipe.description}\n{'':<{width}}  stages: {', '.join(recipe.stages)}")
    print("\n`thence recipes NAME` prints one; `thence plan NAME --hardware h100x8` says what it costs.")
    return 0

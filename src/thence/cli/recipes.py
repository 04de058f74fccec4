"""``thence recipes``."""

from __future__ import annotations

from collections.abc import Sequence

from thence.recipe import load_recipe, shipped_recipes


def recipes_command(argv: Sequence[str]) -> int:
    """List the shipped recipes, or print one's file."""
    shipped = shipped_recipes()
    if argv and argv[0] in shipped:
        print(shipped[argv[0]].read_text(encoding="utf-8"), end="")
        return 0
    width = max(map(len, shipped))
    for name in shipped:
        recipe = load_recipe(name)
        print(f"{name:<{width}}  {recipe.description}\n{'':<{width}}  stages: {', '.join(recipe.stages)}")
    print("\n`thence recipes NAME` prints one; `thence run NAME --dry-run` says what it costs.")
    return 0

"""Recipes: one typed schema for TOML files, Python and command-line flags.

`schema` and `tables` have the tables and their fields, `reading` makes a recipe of a file or mapping, `overrides` lays
flags over it. Nothing here imports torch, so that ``thence --help`` and ``--dry-run`` of a typo answer at once.
"""

from thence.recipe.overrides import apply_overrides, type_of
from thence.recipe.reading import (
    build_recipe,
    load_recipe,
    naming_fields_of,
    read_recipe_file,
    read_tables,
    shipped_recipes,
)
from thence.recipe.schema import KINDS, Eval, Optimization, Recipe, Rl, Sft, kind_of
from thence.recipe.tables import Data, Faulty, Lora, Model, Sharding, Trackers

__all__ = [
    "KINDS", "Data", "Eval", "Faulty", "Lora", "Model", "Optimization", "Recipe", "Rl", "Sft", "Sharding", "Trackers",
    "apply_overrides", "build_recipe", "kind_of", "load_recipe", "naming_fields_of", "read_recipe_file", "read_tables",
    "shipped_recipes", "type_of",
]  # fmt: skip

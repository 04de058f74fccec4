"""``thence schema``."""

from __future__ import annotations

from typing import Literal

from thence.files import to_json


def schema_command(of: Literal["recipe", "comparison"] = "recipe", /) -> int:
    """Print the JSON schema of recipes or comparisons, for an editor that completes and checks TOML.

    Write it to a file and name it in the first line of a recipe: #:schema ./recipe.schema.json

    Examples:

      thence schema > recipe.schema.json
      thence schema comparison > comparison.schema.json

    Args:
        of: What the schema describes. Default: recipe.
    """
    if of == "recipe":
        from thence.recipe.json_schema import recipe_schema

        schema = recipe_schema()
    else:
        from thence.compare.json_schema import comparison_schema

        schema = comparison_schema()
    print(to_json(schema, indent=1))
    return 0

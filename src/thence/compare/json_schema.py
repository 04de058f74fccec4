"""The JSON schema of a comparison, for editors."""

from __future__ import annotations

from typing import Any

from thence.compare.recipe import ComparisonRecipe
from thence.recipe.json_schema import DRAFT


def comparison_schema() -> dict[str, Any]:
    """The schema of a comparison's file. The tables of recipes inside it are open: ``thence schema`` has theirs."""
    return {"$schema": DRAFT, **ComparisonRecipe.model_json_schema(), "title": "A comparison of thence"}

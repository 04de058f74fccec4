"""The test sets that a recipe names: those of an evaluation, and those that a training stage is measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thence.errors import RecipeError
from thence.recipe import Eval, Optimization, Recipe


def test_sets(stage: Eval) -> dict[str, dict[str, Any]]:
    """The named test sets of a stage, each as overrides of [data]."""
    own = {"split": "test", **stage.data}
    return {name: {**own, **table} for name, table in (stage.splits or {own["split"]: {}}).items()}


@dataclass(frozen=True)
class MeasuredSet:
    """A test set that a training stage is measured on.

    Args:
        name: of the test set.
        owner: the eval stage that names it, and says how it is sampled and graded.
        stage: the settings of that stage.
        table: overrides of [data].
    """

    name: str
    owner: str
    stage: Eval
    table: dict[str, Any]


def measured_sets(recipe: Recipe, name: str) -> list[MeasuredSet]:
    """The test sets that a training stage is measured on while it trains; none where ``eval_every`` is not set.

    Raises:
        RecipeError: the recipe has no such test set.
    """
    stage = recipe.stage(name)
    if not isinstance(stage, Optimization) or stage.eval_every is None:
        return []
    at = recipe.stages.index(name)
    found: dict[str, MeasuredSet] = {}
    default: list[str] = []
    for owner in (*recipe.stages[at + 1 :], *reversed(recipe.stages[:at])):  # the next eval stage comes first
        evaluation = recipe.stage(owner)
        if isinstance(evaluation, Eval):
            tables = test_sets(evaluation)
            default = default or list(tables)
            for key, table in tables.items():
                found.setdefault(key, MeasuredSet(key, owner, evaluation, table))
    if not found:
        raise RecipeError(
            "the recipe has no test set to measure on: no stage is an evaluation",
            remedy='add one, for example stages = ["sft", "eval"], or leave eval_every out',
            field=f"{name}.eval_every",
        )
    wanted = list(dict.fromkeys(stage.eval_on or default))
    if unknown := [key for key in wanted if key not in found]:
        raise RecipeError(
            f"the recipe has no test set {unknown[0]!r}",
            remedy=f"give names of these: {', '.join(found)}; or add [eval.splits.{unknown[0]}]",
            field=f"{name}.eval_on",
        )
    return [found[key] for key in wanted]

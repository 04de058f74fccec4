"""Everything that the arms of a comparison name, tried before its first run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from thence.compare.bases import recipe_of
from thence.compare.plan import PlannedRun, Planner
from thence.compare.recipe import all_stages
from thence.errors import UserError
from thence.recipe import build_recipe

if TYPE_CHECKING:
    from thence.pipeline.prompts import RenderedPrompts

FEW_ROWS = 2000


def refuse_what_cannot_run(
    planner: Planner, runs: Iterable[PlannedRun], prompts: RenderedPrompts | None = None
) -> None:
    """Try the recipe of every arm that is to run, on every base and with every value of its grid.

    Args:
        prompts: takes the data tables that are rendered.

    Raises:
        UserError: what cannot work, with the arm or base that it belongs to.
    """
    from thence.compare.summary import no_accuracy
    from thence.pipeline.preflight import gives_degrees, preflight, refuse
    from thence.pipeline.prompts import RenderedPrompts

    prompts = prompts or RenderedPrompts()
    for name, tables in _trials(planner, list(runs)):
        try:
            found = preflight(build_recipe(tables), planner.folder / "preflight", prompts=prompts)
            refuse(found)
            for finding in found:
                if finding.part.startswith("eval") and gives_degrees(finding):
                    raise no_accuracy(finding.reason.split(":")[0])
        except UserError as error:
            where = f"{name}: {error.field}" if error.field else name
            raise type(error)(
                error.problem, remedy=error.remedy, file=error.file, line=error.line, field=where
            ) from None


def _trials(planner: Planner, runs: list[PlannedRun]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Recipes that stand for all runs: the first seed of each."""
    recipe, bases, recipes = planner.recipe, {}, set()
    for run in runs:
        bases.setdefault(run.base, run)
        if not run.arm:
            job, origin = planner.job(run), recipe.bases[run.base].recipe
            if job is not None and bases[run.base] == run:
                yield f"bases.{run.base}", _with_few_rows(job.tables) if origin in recipes else dict(job.tables)
                recipes.add(origin)
    arms = {run.arm for run in runs if run.arm}
    models = [_model(planner, first) for first in bases.values()]
    for model in (model for i, model in enumerate(models) if model not in models[:i]):  # pretrained alike: tried once
        for arm, _, tables in all_stages(recipe):
            if arm in arms:
                tables = {**tables, "model": {**recipe.model, **model}}
                yield f"arms.{arm}", tables
                if recipe.tuning.eval and recipe.arms[arm].grid:
                    yield f"tuning.eval of arms.{arm}", {**tables, "eval": {**recipe.eval, **recipe.tuning.eval}}


def _with_few_rows(tables: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe of which another base was tried with all rows: a corpus of pretraining takes half a minute to read."""
    data = tables.get("data", {})
    held_out = max([table.get("held_out", 0) for table in tables.values() if isinstance(table, Mapping)] or [0])
    few = 2 * held_out + FEW_ROWS
    return {**tables, "data": {**data, "limit": min(few, data["limit"])}} if "limit" in data else dict(tables)


def _model(planner: Planner, run: PlannedRun) -> dict[str, Any]:
    """What a base is like before anything is trained."""
    base = planner.recipe.bases[run.base]
    if base.path is not None:
        return {"path": base.path.replace("{seed}", str(run.seed))}
    return recipe_of(base).model.model_dump(mode="json", exclude_none=True)

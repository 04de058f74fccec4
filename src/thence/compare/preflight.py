"""Everything that the arms of a comparison name, tried before its first run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from thence.compare.plan import Need, Planner
from thence.compare.recipe import all_stages
from thence.errors import UserError
from thence.recipe import build_recipe, load_recipe, read_tables


def refuse_what_cannot_run(planner: Planner, needs: Iterable[Need]) -> None:
    """Try the recipe of every arm that is to run, on every base and with every value of its grid.

    Raises:
        UserError: what cannot work, with the arm or base that it belongs to.
    """
    from thence.compare.summary import no_accuracy
    from thence.pipeline.preflight import gives_degrees, preflight, refuse
    from thence.pipeline.prompts import RenderedPrompts

    prompts = RenderedPrompts()
    for name, tables in _trials(planner, list(needs)):
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


def _trials(planner: Planner, needs: list[Need]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Recipes that stand for all runs: the first seed of each."""
    recipe, bases = planner.recipe, {}
    for need in needs:
        bases.setdefault(need.base, need)
        if not need.arm:
            job = planner.job(need)
            if job is not None and bases[need.base] == need:
                yield f"bases.{need.base}", dict(job.tables)
    arms = {need.arm for need in needs if need.arm}
    for first in bases.values():
        model = _model(planner, first)
        for arm, _, tables in all_stages(recipe):
            if arm in arms:
                tables = {**tables, "model": {**recipe.model, **model}}
                yield f"arms.{arm}", tables
                if recipe.tuning.eval and recipe.arms[arm].grid:
                    yield f"tuning.eval of arms.{arm}", {**tables, "eval": {**recipe.eval, **recipe.tuning.eval}}


def _model(planner: Planner, need: Need) -> dict[str, Any]:
    """What a base is like before anything is trained."""
    base = planner.recipe.bases[need.base]
    if base.path is not None:
        return {"path": base.path.replace("{seed}", str(need.seed))}
    return load_recipe(read_tables(str(base.recipe))[1]).model.model_dump(mode="json", exclude_none=True)

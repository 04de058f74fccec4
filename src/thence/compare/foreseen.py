"""What the runs of a comparison are planned to cost, all of them together; and beside it what they did cost."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from thence.accounting.memory import readable
from thence.compare.bases import recipe_of
from thence.compare.plan import PlannedRun, Planner, limited, pretraining_tables
from thence.errors import UserError, first_line
from thence.recipe import Recipe, build_recipe
from thence.wording import counted

log = logging.getLogger(__name__)
Span = tuple[float, float]
_MEASURES = {"flops": "rule_flops", "tokens": "trained_tokens", "steps": "steps"}


@dataclass(frozen=True, slots=True)
class RunCost:
    """What one run is planned to cost, from the least to the most; None: not known.

    Args:
        rule_flops, trained_tokens, generated_tokens: of its training stages.
        steps: optimizer steps.
        peak: bytes that its process holds at most.
    """

    rule_flops: Span | None = None
    trained_tokens: Span | None = None
    generated_tokens: Span | None = None
    steps: Span | None = None
    peak: int | None = None


@dataclass(frozen=True, slots=True)
class ForeseenRuns:
    """What runs are planned to cost, each by itself.

    Args:
        each: their costs.
        jobs: processes side by side.
    """

    each: Mapping[PlannedRun, RunCost]
    jobs: int

    def total(self, quantity: str, runs: Collection[PlannedRun] | None = None) -> Span:
        """A quantity of the runs that it is known of, together."""
        chosen = [cost for run, cost in self.each.items() if runs is None or run in runs]
        spans = [span for cost in chosen if (span := getattr(cost, quantity)) is not None]
        return sum(span[0] for span in spans), sum(span[1] for span in spans)

    @property
    def unknown(self) -> int:
        """Runs whose FLOPs are not known."""
        return sum(cost.rule_flops is None for cost in self.each.values())

    def __str__(self) -> str:
        peaks = [cost.peak for cost in self.each.values() if cost.peak is not None]
        memory = "memory not known" if not peaks else f"{readable(max(peaks))} in a process at most"
        parts = [
            f"{_said(self.total('rule_flops'), '{:.3g}')} FLOPs by the rule",
            f"{_said(self.total('trained_tokens'), '{:,.0f}')} tokens trained, "
            f"{_said(self.total('generated_tokens'), '{:,.0f}')} sampled",
            memory,
        ]
        missing = f"; {counted(self.unknown, 'run')} not counted" if self.unknown else ""
        side = f", {self.jobs} side by side" if self.jobs > 1 else ""
        return f"plan of {counted(len(self.each), 'run')}{side}: {'; '.join(parts)}{missing}"


def _said(span: Span, pattern: str) -> str:
    least, most = (pattern.format(value) for value in span)
    return least if least == most else f"{least} to {most}"


def foresee_runs(planner: Planner, runs: Sequence[PlannedRun], prompts: Any, jobs: int) -> ForeseenRuns | None:
    """Plan the runs that are to come. None: no plan could be made, and the log says why: nothing fails for it.

    Args:
        prompts: data tables that are rendered already; others are not rendered for the plan's sake.
        jobs: processes side by side.
    """
    known: dict[tuple[str, str], RunCost] = {}
    try:
        return ForeseenRuns({run: _cost(planner, run, prompts, known) for run in runs}, jobs)
    except Exception as error:  # whatever it is, the comparison is worth more
        log.warning("no plan was made: %s", first_line(error))
        return None


def refuse_spent(planner: Planner, foreseen: ForeseenRuns) -> None:
    """Refuse an arm for which the plan leaves nothing of the budget: it would fail hours later.

    Raises:
        UserError: the arms before it spend the whole budget by the plan.
    """
    recipe, budget = planner.recipe, planner.recipe.budget
    for run in foreseen.each:
        if budget is None or not run.arm or not recipe.arms[run.arm].budget:
            continue
        before = [PlannedRun(arm, run.base, run.seed) for arm in recipe.lineage(run.arm)[:-1]]
        costs = [getattr(foreseen.each.get(each), _MEASURES[budget.measure], None) for each in before]
        known = [cost[0] for cost in costs if cost is not None]
        if before and len(known) == len(before) and sum(known) >= budget.amount:
            raise UserError(
                f"by the plan {before[-1].arm} from {run.base} spends the whole budget of {budget}, and nothing is "
                f"left for {run.arm} after it",
                remedy="give a larger budget, or a shorter stage before it",
                field=f"arms.{run.arm}",
            )


def _cost(planner: Planner, run: PlannedRun, prompts: Any, known: dict[tuple[str, str], RunCost]) -> RunCost:
    """The cost of a run; of an arm from a base it does not depend on the seed or on a value of the grid."""
    if (run.arm, run.base) not in known:
        cost = RunCost()
        with suppress(UserError):  # a budget that is spent before, and what else its run would tell
            cost = _planned(build_recipe(_tables(planner, run, prompts, known)), prompts)
        known[run.arm, run.base] = cost
    return known[run.arm, run.base]


def _tables(planner: Planner, run: PlannedRun, prompts: Any, known: dict[tuple[str, str], RunCost]) -> dict[str, Any]:
    """The recipe's tables of a run, with the model that its base has before anything is trained."""
    recipe = planner.recipe
    if not run.arm:
        return pretraining_tables(recipe, run)
    arm, base = recipe.arms[run.arm], recipe.bases[run.base]
    model = {"path": base.path.replace("{seed}", str(run.seed))} if base.path is not None else None
    if model is None:
        model = recipe_of(base).model.model_dump(mode="json", exclude_none=True)
    tables: dict[str, Any] = {
        "stages": arm.stages,
        "model": {**recipe.model, **model},
        "data": recipe.data,
        "eval": recipe.eval,
    }
    if arm.kind:
        chosen = arm.candidates()[0] if run.chosen is None else json.loads(run.chosen)
        spent = 0.0
        measure = _MEASURES[recipe.budget.measure] if recipe.budget is not None else ""
        for parent in recipe.lineage(run.arm)[:-1] if measure else ():
            cost = _cost(planner, PlannedRun(parent, run.base, run.seed), prompts, known)
            span = getattr(cost, measure)
            spent += 0.0 if span is None else span[1]
        tables[arm.kind] = limited(recipe, run.arm, recipe.stage(run.arm, chosen), spent)
    return tables


def _planned(recipe: Recipe, prompts: Any) -> RunCost:
    import torch

    from thence.pipeline.foreseen import foresee

    found = foresee(recipe, recipe.stages, prompts, 1, torch.device("cpu"))
    if found is None:
        return RunCost()
    steps = [each["steps"] for name, each in found.each.items() if not name.startswith("eval")]
    total = None if None in steps else float(sum(steps))
    return RunCost(
        rule_flops=found.rule_flops,
        trained_tokens=found.trained_tokens,
        generated_tokens=found.generated_tokens,
        steps=None if total is None else (total, total),
        peak=found.peak,
    )


def spent_line(planner: Planner, foreseen: ForeseenRuns) -> str:
    """What was planned for the runs that are done now, beside what they spent; "": none of them is."""
    done = {run: summary for run in foreseen.each if run.arm and (summary := planner.summary(run)) is not None}
    counted_runs = [run for run in done if foreseen.each[run].rule_flops is not None]
    if not counted_runs:
        return ""
    flops = sum(done[run].own.rule_flops for run in counted_runs)
    tokens = sum(done[run].own.trained_tokens for run in counted_runs)
    planned = (foreseen.total("rule_flops", counted_runs), foreseen.total("trained_tokens", counted_runs))
    return (
        f"{counted(len(counted_runs), 'run')}: {_said(planned[0], '{:.3g}')} FLOPs by the rule planned, "
        f"{flops:.3g} measured; {_said(planned[1], '{:,.0f}')} tokens trained planned, {tokens:,.0f} measured"
    )

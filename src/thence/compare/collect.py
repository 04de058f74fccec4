"""From a comparison's folder to the records of its report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import reduce
from operator import add

from thence.compare.bases import Base, recipe_of
from thence.compare.plan import PlannedRun, Planner, Selection
from thence.compare.recipe import ComparisonRecipe
from thence.compare.result import NOTHING, RESULTS, Arm, Comparison, Failure, Run, Try, read_results
from thence.methods.registry import methods
from thence.pipeline.folder import environment
from thence.redaction import redacted


def collect(planner: Planner, failures: Sequence[Failure] = (), ran: bool = False) -> Comparison:
    """Everything that is there so far; runs that are not done are counted as pending.

    Args:
        ran: something has just been run. If not, the environment of the results that are there already stays: a later
            version of the code that only reads them has not made them.
    """
    recipe = planner.recipe
    arms = tuple(arm_of(recipe, name) for name in recipe.arms)
    everything = Planner(recipe, planner.folder)
    runs, blocks = list(everything.runs()), set(recipe.blocks())
    finished = [run for run in runs if run.arm and everything.summary(run)]
    here = {**environment("cpu"), "bases": {name: redacted(origin_of(base)) for name, base in recipe.bases.items()}}
    kept = read_results(planner.folder) if (planner.folder / RESULTS).exists() else None
    if not ran and kept is not None:
        here = {**kept.environment, "bases": here["bases"]}
    return Comparison(
        name=recipe.name,
        description=recipe.description,
        reference=recipe.reference,
        budget=str(recipe.budget or "none: every arm goes to its own end"),
        bases=tuple(recipe.bases),
        seeds=tuple(dict.fromkeys(seed for _, seed in recipe.blocks())),
        columns=recipe.columns(),
        arms=arms,
        runs=tuple(run_of(everything, run) for run in finished if (run.base, run.seed) in blocks),
        tuning_runs=tuple(run_of(everything, run) for run in finished if (run.base, run.seed) not in blocks),
        tries=tuple(tries_of(everything)),
        failures=tuple(failures),
        pending=sum(not everything.is_done(run) for run in runs),
        sections=tuple(recipe.sections),
        environment=here,
        base_seeds={base: tuple(recipe.seeds_of(base)) for base in recipe.bases},
        covariate=recipe.covariate.model_dump() if recipe.covariate else {},
        registration=kept.registration if kept is not None else None,
        contrasts=tuple(contrast.model_dump() for contrast in recipe.contrasts),
    )


def origin_of(base: Base) -> str:
    """Where a base comes from: its path, or what the recipe that pretrains it is trained on."""
    if base.path is not None:
        return base.path
    return ", ".join(recipe_of(base).data.source)


def arm_of(recipe: ComparisonRecipe, name: str) -> Arm:
    """An arm as the report shows it."""
    table = recipe.arms[name]
    stage = recipe.stage(name, table.candidates()[0]) if table.kind else {}
    method = str(stage.get("method", {"sft": "sft", "rl": "grpo"}.get(table.kind, "")))
    fault = stage.get("fault") or {}
    names = [fault] if isinstance(fault, str) else fault if isinstance(fault, list) else fault.get("names", [])
    accumulation = fault.get("accumulation", 8) if isinstance(fault, dict) else 8
    return Arm(
        name=name,
        title=table.title or name,
        group=table.group,
        after=table.after,
        kind=table.kind,
        method=method,
        fault=tuple(names),
        accumulation=accumulation if names else 0,
        tries=tries_in(recipe, name),
        reconstruction=bool(method) and methods()[method].exactness_with(stage.get("options", {})) == "reconstruction",
        paper=table.paper,
        note=table.note,
    )


def tries_in(recipe: ComparisonRecipe, name: str) -> int:
    """Settings tried for an arm and for those that it builds on."""
    tables = [recipe.arms[arm] for arm in recipe.lineage(name)]
    return 1 + sum(len((recipe.arms[t.like] if t.like else t).candidates()) - 1 for t in tables)


def run_of(planner: Planner, run: PlannedRun) -> Run:
    """A finished run as the report shows it."""
    job, summary = planner.job(run), planner.summary(run)
    assert job is not None and summary is not None
    return Run(
        arm=run.arm,
        base=run.base,
        seed=run.seed,
        settings=(planner.chosen(run.arm, run.base) if run.chosen is None else json.loads(run.chosen)) or {},
        spent=reduce(add, (part.own for part in planner.way(run)), NOTHING),
        own=summary.own,
        measured=summary.measured,
        curve=summary.curve,
        folder=str(job.folder),
    )


def tries_of(planner: Planner) -> list[Try]:
    """What tuning has tried so far."""
    found = []
    for arm, table in planner.recipe.arms.items():
        for base in Selection(planner.recipe).tuned_bases() if table.grid else ():
            chosen = planner.chosen(arm, base)
            for settings, accuracy in planner.tries(arm, base):
                if accuracy is not None:
                    found.append(Try(arm, base, settings, accuracy, json.dumps(settings) == json.dumps(chosen)))
    return found

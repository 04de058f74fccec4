"""From a comparison to runs: what is needed, what of it can start now, and where it is kept.

A run is one stage of one arm and its evaluation, in a folder named after the settings. Runs that start from another
arm's model start from the folder of that arm's run, so that arms share what they have in common and nothing is trained
twice.

What a finished run measured is also in the comparison's ``results.json``. Where that file is there and the run's folder
is not, as in a fresh checkout of kept results, the run counts as done; it is made again only if a run that is still to
come starts from its model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thence.compare.absolute import absolute_data, absolute_stage
from thence.compare.bases import pretraining_recipe
from thence.compare.recipe import ComparisonRecipe, check_methods
from thence.compare.result import RESULTS, read_results
from thence.compare.summary import Summary, read_summary
from thence.errors import DamagedFile, UserError
from thence.pipeline.folder import RunFolder
from thence.recipe import KINDS, apply_overrides, kind_of

UNLIMITED = 1_000_000  # steps of an RL stage that its budget ends


@dataclass(frozen=True)
class PlannedRun:
    """A run that the comparison needs.

    Args:
        arm: its name; empty for the pretraining of a base.
        chosen: values of the grid to try, as JSON; None: those that tuning chose.
    """

    arm: str
    base: str
    seed: int
    chosen: str | None = None


@dataclass(frozen=True)
class Job:
    """A run that can start: the recipe's tables, and its folder relative to the comparison's."""

    run: PlannedRun
    tables: Mapping[str, Any]
    folder: Path


@dataclass(frozen=True)
class Selection:
    """Which runs of a comparison are asked for, in which order; nothing of what is done.

    Args:
        recipe: the comparison.
        only: arms to run, with those that they build on; empty: all.
        seeds: reported seeds to run; empty: all.
        bases: bases to run from; empty: all.
    """

    recipe: ComparisonRecipe
    only: Collection[str] = ()
    seeds: Collection[int] = ()
    bases: Collection[str] = ()

    def runs(self) -> Iterator[PlannedRun]:
        """Every run of the comparison: what others wait for first, then block by block."""
        seen: set[PlannedRun] = set()
        for run in self._all():
            if run not in seen:
                seen.add(run)
                yield run

    def _all(self) -> Iterator[PlannedRun]:
        recipe = self.recipe
        arms = [arm for arm in recipe.arms if self._is_wanted(arm)]
        tuned = [arm for arm in arms if recipe.arms[arm].grid]
        bases = self.tuned_bases()
        for seed in recipe.tuning.seeds if tuned else ():
            for base in bases:
                yield from self.pretraining(base, seed)
            for arm in tuned:
                for base in bases:
                    yield from (PlannedRun(parent, base, seed) for parent in recipe.lineage(arm)[:-1])
                    for chosen in recipe.arms[arm].candidates():
                        yield PlannedRun(arm, base, seed, json.dumps(chosen))
        for base, seed in self.blocks():
            yield from self.pretraining(base, seed)
            yield from (PlannedRun(arm, base, seed) for arm in arms)

    def blocks(self) -> list[tuple[str, int]]:
        """The blocks that are asked for, in order: each a base with a seed."""
        wanted = [(base, seed) for base, seed in self.recipe.blocks() if not self.bases or base in self.bases]
        return [(base, seed) for base, seed in wanted if not self.seeds or seed in self.seeds]

    def tuned_bases(self) -> list[str]:
        """The bases on which the values are tuned that the bases asked for use."""
        wanted = [base for base in self.recipe.bases if not self.bases or base in self.bases]
        return list(dict.fromkeys(map(self.recipe.tuned_base, wanted)))

    def pretraining(self, base: str, seed: int) -> list[PlannedRun]:
        """The run that trains a base; none where the base is a model that is there."""
        return [PlannedRun("", base, seed)] if self.recipe.bases[base].recipe is not None else []

    def _is_wanted(self, arm: str) -> bool:
        if not self.only:
            return True
        wanted: set[str] = set()
        for name in self.only:
            for member in self.recipe.lineage(name):
                wanted |= {member, *([like] if (like := self.recipe.arms[member].like) else [])}
        for name in list(wanted):
            wanted |= set(self.recipe.lineage(name))
        return arm in wanted

    def builds_on(self, run: PlannedRun) -> list[PlannedRun]:
        """The runs before a run, from the pretraining of its base on."""
        if not run.arm:
            return []
        parents = (PlannedRun(arm, run.base, run.seed) for arm in self.recipe.lineage(run.arm)[:-1])
        return [*self.pretraining(run.base, run.seed), *parents]


@dataclass
class Planner:
    """Answers what can start, from what the folder holds.

    Args:
        recipe: the comparison.
        folder: its folder.
        only, seeds, bases: as of :class:`Selection`.

    Raises:
        UserError: an arm has a method, option or fault that there is not.
        DamagedFile: the results that the folder holds cannot be read; later, the summary of a run.
    """

    recipe: ComparisonRecipe
    folder: Path
    only: Collection[str] = ()
    seeds: Collection[int] = ()
    bases: Collection[str] = ()
    _jobs: dict[PlannedRun, Job] = field(default_factory=dict)
    _summaries: dict[PlannedRun, Summary] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_methods(self.recipe)
        self._selection = Selection(self.recipe, self.only, self.seeds, self.bases)
        self._kept: dict[str, Summary] = {}
        """What ``results.json`` tells, by the runs' folders; nothing where it is missing."""
        if (self.folder / RESULTS).exists():
            kept = read_results(self.folder)
            self._kept = {r.folder: Summary(r.own, r.measured, r.curve) for r in (*kept.runs, *kept.tuning_runs)}

    def runs(self) -> Iterator[PlannedRun]:
        """Every run of the comparison, see :meth:`Selection.runs`."""
        return self._selection.runs()

    def job(self, run: PlannedRun) -> Job | None:
        """The run with its tables; None while what an arm before it spent, or its tuning, is not known.

        Raises:
            UserError: it can never start; what it builds on has spent the budget.
        """
        if run in self._jobs:
            return self._jobs[run]
        tables = self._tables(run) if run.arm else pretraining_tables(self.recipe, run)
        if tables is None:
            return None
        digest = hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()[:8]
        where = Path("runs", run.base, f"seed{run.seed}", run.arm) if run.arm else Path("bases", run.base, "seed")
        name = f"{run.arm}-{digest}" if run.arm else f"seed{run.seed}-{digest}"
        folder = where.with_name(name)
        self._jobs[run] = Job(run, {**tables, "folder": str(folder)}, folder)
        return self._jobs[run]

    def job_if_any(self, run: PlannedRun) -> Job | None:
        """The run with its tables; None where they are not known, or it can never start. Raises DamagedFile."""
        try:
            return self.job(run)
        except DamagedFile:
            raise
        except UserError:  # it can never start
            return None

    def is_done(self, run: PlannedRun) -> bool:
        """Whether nothing is left to do: the run is complete, or it is a base that no run to come starts from."""
        if run.arm:
            return self.summary(run) is not None
        starting = (other for other in self.runs() if other.arm and run in self._selection.builds_on(other))
        return self.has_model(run) or all(self.summary(other) for other in starting)

    def has_model(self, run: PlannedRun) -> bool:
        """Whether a run has left its model in its folder."""
        job = self.job_if_any(run)
        if job is None:
            return False
        if not run.arm:
            return RunFolder(self.folder / job.folder).is_done(job.tables["stages"][-1])
        return (self.folder / job.folder / "stages" / self.recipe.arms[run.arm].kind / "model").is_dir()

    def can_start(self, run: PlannedRun) -> bool:
        """Whether the model that a run starts from is there."""
        before = self._selection.builds_on(run)
        return not before or self.has_model(before[-1])

    def to_run(self) -> list[PlannedRun]:
        """What is not done, and what of the rest has to be repeated for its model; in the order of `runs`."""
        runs = list(self.runs())
        wanted = {run for run in runs if run.arm and self.summary(run) is None}
        for run in list(wanted):
            for before in reversed(self._selection.builds_on(run)):
                if self.has_model(before):
                    break
                wanted.add(before)
        return [run for run in runs if run in wanted]

    def summary(self, run: PlannedRun) -> Summary | None:
        """What a finished run measured and spent; None while it is not finished."""
        if run not in self._summaries:
            job = self.job_if_any(run)
            found = job and (read_summary(self.folder / job.folder) or self._kept.get(str(job.folder)))
            if found is None:
                return None
            self._summaries[run] = found
        return self._summaries[run]

    def chosen(self, arm: str, base: str) -> dict[str, Any] | None:
        """The values that tuning chose for an arm; None while a try is missing. The first of equals wins."""
        source = self.recipe.arms[arm].like or arm
        scores = self.tries(source, self.recipe.tuned_base(base))
        if any(score is None for _, score in scores):
            return None
        return max(scores, key=lambda each: each[1] or 0.0)[0]

    def tries(self, arm: str, base: str) -> list[tuple[dict[str, Any], float | None]]:
        """Every combination of an arm's grid with its mean accuracy on the dev split; None: not measured yet."""
        candidates = self.recipe.arms[arm].candidates()
        if len(candidates) == 1:
            return [(candidates[0], 0.0)]
        return [(chosen, self._accuracy(arm, base, chosen)) for chosen in candidates]

    def _accuracy(self, arm: str, base: str, chosen: Mapping[str, Any]) -> float | None:
        text = json.dumps(chosen)
        found = [self.summary(PlannedRun(arm, base, seed, text)) for seed in self.recipe.tuning.seeds]
        scores = [m.accuracy for summary in found if summary is not None for m in summary.measured]
        return sum(scores) / len(scores) if scores and None not in found else None

    def _tables(self, run: PlannedRun) -> dict[str, Any] | None:
        recipe, arm = self.recipe, self.recipe.arms[run.arm]
        chosen = self.chosen(run.arm, run.base) if run.chosen is None else json.loads(run.chosen)
        start = self._start(run)
        if chosen is None or start is None:
            return None
        model, spent = start
        tuning = run.seed not in recipe.seeds_of(run.base)
        tables: dict[str, Any] = {
            "name": run.arm,
            "seed": run.seed,
            "stages": arm.stages,
            "model": {**recipe.model, "path": model},
            "data": recipe.data,
            "eval": {**recipe.eval, **(recipe.tuning.eval if tuning else {})},
        }
        if arm.kind:
            tables[arm.kind] = limited(recipe, run.arm, recipe.stage(run.arm, chosen), spent)
        return tables

    def _start(self, run: PlannedRun) -> tuple[str, float] | None:
        """The model that a run starts from, and what of the budget is spent by then."""
        parent = self.recipe.arms[run.arm].after
        if parent:
            before = PlannedRun(parent, run.base, run.seed)
            job, summary = self.job(before), self.summary(before)
            if job is None or summary is None:
                return None
            return str(job.folder / "stages" / self.recipe.arms[parent].kind / "model"), self.spent(before)
        base = self.recipe.bases[run.base]
        if base.path is not None:
            path = base.path.replace("{seed}", str(run.seed))
            return str(Path(path).resolve()) if Path(path).exists() else path, 0.0
        job = self.job(PlannedRun("", run.base, run.seed))
        assert job is not None, "a pretraining builds on nothing"
        return str(job.folder / "stages" / job.tables["stages"][-1] / "model"), 0.0

    def spent(self, run: PlannedRun) -> float:
        """What a finished run and those before it have spent, in the budget's measure."""
        measure = {"flops": "rule_flops", "tokens": "trained_tokens", "steps": "steps"}
        budget = self.recipe.budget
        return 0.0 if budget is None else float(sum(getattr(s.own, measure[budget.measure]) for s in self.way(run)))

    def way(self, run: PlannedRun) -> list[Summary]:
        """The summaries of a finished run and of those that it builds on."""
        found = [
            self.summary(PlannedRun(arm, run.base, run.seed, run.chosen if arm == run.arm else None))
            for arm in self.recipe.lineage(run.arm)
        ]
        return [summary for summary in found if summary is not None]


def limited(recipe: ComparisonRecipe, arm: str, table: dict[str, Any], spent: float) -> dict[str, Any]:
    """An arm's stage with what is left of the budget. Raises UserError where nothing is left."""
    budget = recipe.budget
    if budget is None or not recipe.arms[arm].budget:
        return table
    left = budget.amount - spent
    if left <= 0:
        raise UserError(
            f"the arm that {arm} comes after has spent the budget of {budget}",
            remedy="give a larger budget, or a shorter stage before it",
            field=f"arms.{arm}",
        )
    if budget.measure == "steps":
        return {**table, "steps": min(int(left), table.get("steps", int(left)))}
    limit = int(left) if budget.measure == "tokens" else left
    steps = {"steps": UNLIMITED} if recipe.arms[arm].kind == "rl" else {}
    return {**steps, **table, budget.measure: limit}


def pretraining_tables(recipe: ComparisonRecipe, run: PlannedRun) -> dict[str, Any]:
    """A recipe's tables that train a base, without its evaluations."""
    tables = pretraining_recipe(recipe.bases[run.base])
    own = {key: value for key, value in tables.items() if key != "folder"}
    own |= {key: absolute_stage(own[key]) for key in own if kind_of(key) in KINDS}  # workers run elsewhere
    own |= {"data": absolute_data(own["data"])} if "data" in own else {}
    return apply_overrides(own, {"seed": run.seed, "data.seed": run.seed})

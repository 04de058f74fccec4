"""What a comparison shows while it runs: a table on a terminal, a line a run elsewhere."""

from __future__ import annotations

import time
from collections.abc import Collection

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from thence.compare.plan import Job, PlannedRun, Planner
from thence.compare.recipe import ComparisonRecipe
from thence.display import Display
from thence.wording import duration

REFRESHES = 2  # a second


class LiveTable(Display):
    """Arms by bases: how many of their runs are done, which one goes on, and how long the rest will take."""

    def __init__(self, console: Console, jobs: int):
        self.live = Live(console=console, refresh_per_second=REFRESHES)
        super().__init__(console, self.live)
        self.jobs = jobs
        self.runs: list[PlannedRun] = []
        self.ended: set[PlannedRun] = set()
        self.failures: dict[PlannedRun, str] = {}
        self.running: dict[PlannedRun, tuple[str, int, int]] = {}
        self.seconds: dict[str, list[float]] = {}
        self.began = time.monotonic()

    def begin(self, planner: Planner, runs: Collection[PlannedRun]) -> None:
        """See :class:`thence.compare.engine.ComparisonWatcher`."""
        self.planner, self.runs = planner, list(runs)
        self.ended = {run for run in runs if planner.is_done(run)}
        self.before = len(self.ended)
        self._show(f"{len(runs)} runs, {len(self.ended)} of them are done")

    def progress(self, job: Job, stage: str, done: int, total: int) -> None:
        self.running[job.run] = (stage, done, total)
        self._show()

    def finished(self, job: Job, seconds: float) -> None:
        self.running.pop(job.run, None)
        self.ended.add(job.run)
        self.seconds.setdefault(job.run.arm, []).append(seconds)
        summary = self.planner.summary(job.run) if job.run.arm else None
        score = ""
        if summary is not None:
            column = summary.measured[0]
            score = f": {100 * column.accuracy:.1f}% {column.column.split}, T = {column.column.temperature:g}"
        self._show(f"{title(job.run)}{score} ({duration(seconds)}); {self.left()}")

    def failed(self, run: PlannedRun, why: str) -> None:
        self.running.pop(run, None)
        self.failures[run] = why
        self._show(f"failed: {title(run)}: {why.splitlines()[0]}")

    def left(self) -> str:
        """How much is done, and an estimate of the rest from the mean time of the arms so far."""
        done = len(self.ended)
        counted = f"{done} of {len(self.runs)}"
        rest = [run for run in self.runs if run not in self.ended and run not in self.failures]
        known = [value for values in self.seconds.values() for value in values]
        if not known or not rest:
            return counted
        mean = sum(known) / len(known)
        seconds = sum(sum(own) / len(own) if (own := self.seconds.get(run.arm)) else mean for run in rest)
        return f"{counted}, about {duration(seconds / self.jobs)} left"

    def _show(self, line: str = "") -> None:
        if self.animated:
            self.live.update(self.table(self.planner.recipe))
        elif line:
            self.line(line, wrap=False)

    def table(self, recipe: ComparisonRecipe) -> Table:
        """The table of arms and bases."""
        bases = list(recipe.bases)
        table = Table(title=f"{recipe.name}: {self.left()}", title_justify="left", caption_justify="left")
        table.add_column("arm", no_wrap=True)
        for base in bases:
            table.add_column(base)
        names = [*([""] if any(not run.arm for run in self.runs) else []), *recipe.arms]
        for name in names:
            if any(run.arm == name for run in self.runs):
                table.add_row(name or "pretraining", *(self._cell(name, base) for base in bases))
        return table

    def _cell(self, arm: str, base: str) -> Text:
        runs = [run for run in self.runs if (run.arm, run.base) == (arm, base)]
        done = sum(run in self.ended for run in runs)
        text = Text(f"{done}/{len(runs)}", style="green" if runs and done == len(runs) else "")
        if failed := sum(run in self.failures for run in runs):
            text.append(f"  {failed} failed", style="red")
        for run in runs:
            if run in self.running:
                stage, at, total = self.running[run]
                share = f" {at}" if total > 100_000 else f" {at}/{total}"
                text.append(f"  seed {run.seed} {stage}{share}", style="dim")
        return text


def title(run: PlannedRun) -> str:
    """A run in a few words."""
    name = run.arm or "pretraining"
    tried = f" {run.chosen}" if run.chosen not in (None, "{}") else ""
    return f"{name}{tried} from {run.base}, seed {run.seed}"

"""What a comparison shows while it runs: a table on a terminal, a line a run elsewhere."""

from __future__ import annotations

import time
from collections.abc import Collection

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from thence.compare.foreseen import ForeseenRuns
from thence.compare.plan import Job, PlannedRun, Planner
from thence.compare.result import FEW_BASES
from thence.display import Display
from thence.wording import duration

REFRESHES = 2  # a second
MANY = 100_000
"""Of so many and more (tokens of pretraining, say) only what is done is shown."""


class LiveTable(Display):
    """How long the rest will take, which runs go on, and of arms by bases how many runs are done.

    What goes on stands above the table: a low terminal cuts the bottom of it.
    """

    def __init__(self, console: Console, jobs: int):
        before = Text("trying what the comparison names ...")
        self.live = Live(before, console=console, refresh_per_second=REFRESHES)
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

    def planned(self, foreseen: ForeseenRuns) -> None:
        self.console.print(str(foreseen), soft_wrap=not self.animated, highlight=False, markup=False)

    def spent(self, said: str) -> None:
        self.console.print(said, soft_wrap=not self.animated, highlight=False, markup=False)

    def started(self, job: Job) -> None:
        self.running[job.run] = ("starting", 0, 0)
        self._show()

    def progress(self, job: Job, stage: str, done: int, total: int) -> None:
        self.running[job.run] = (stage, done, total)
        self._show()

    def noted(self, job: Job, what: str) -> None:
        if job.run in self.running:
            self.running[job.run] = (what, 0, 0)
        self._show(f"{title(job.run)}: {what}")

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
            self.live.update(self.screen())
        elif line:
            self.line(line, wrap=False)

    def screen(self) -> Group:
        """What a terminal shows."""
        recipe = self.planner.recipe
        parts: list[RenderableType] = [Text(f"{recipe.name}: {self.left()}", "bold")]
        for run, (stage, at, total) in self.running.items():
            share = f" {at:,}" + (f" of {total:,}" if total <= MANY else "") if total else ""
            parts.append(Text.assemble(title(run), (f"  {stage}{share}", "cyan")))
        return Group(*parts, "", self._table())

    def _table(self) -> Table:
        """Of arms by bases how many runs are done; with many bases, of arms by tuning and blocks."""
        recipe, blocks = self.planner.recipe, set(self.planner.recipe.blocks())
        of_tuning = [run for run in self.runs if (run.base, run.seed) not in blocks]
        of_blocks = [run for run in self.runs if (run.base, run.seed) in blocks]
        columns = {base: [run for run in self.runs if run.base == base] for base in recipe.bases}
        if len(columns) > FEW_BASES:
            columns = {"tuning": of_tuning, f"{len({(r.base, r.seed) for r in of_blocks})} blocks": of_blocks}
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("arm", overflow="fold")
        for name in columns:
            table.add_column(name, overflow="fold")
        names = [*([""] if any(not run.arm for run in self.runs) else []), *recipe.arms]
        for name in names:
            cells = [self._cell([run for run in runs if run.arm == name]) for runs in columns.values()]
            if any(cells):
                table.add_row(name or "pretraining", *cells)
        return table

    def _cell(self, runs: list[PlannedRun]) -> Text:
        if not runs:
            return Text("")
        done = sum(run in self.ended for run in runs)
        text = Text(f"{done}/{len(runs)}", style="green" if done == len(runs) else "")
        if failed := sum(run in self.failures for run in runs):
            text.append(f"  {failed} failed", style="red")
        return text


def title(run: PlannedRun) -> str:
    """A run in a few words."""
    name = run.arm or "pretraining"
    tried = f" {run.chosen}" if run.chosen not in (None, "{}") else ""
    return f"{name}{tried} from {run.base}, seed {run.seed}"

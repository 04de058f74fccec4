"""What a comparison shows while it runs: a table on a terminal, a line a run elsewhere."""

from __future__ import annotations

import time
from collections.abc import Collection
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from thence.compare.plan import Job, Need, Planner
from thence.compare.recipe import ComparisonRecipe
from thence.wording import duration

REFRESHES = 2  # a second


class LiveTable:
    """Arms by bases: how many of their runs are done, which one goes on, and how long the rest will take."""

    def __init__(self, console: Console, jobs: int):
        self.console, self.jobs = console, jobs
        self.live = Live(console=console, refresh_per_second=REFRESHES) if console.is_terminal else None
        self.needs: list[Need] = []
        self.ended: set[Need] = set()
        self.failures: dict[Need, str] = {}
        self.running: dict[Need, tuple[str, int, int]] = {}
        self.seconds: dict[str, list[float]] = {}
        self.began = time.monotonic()

    def __enter__(self) -> LiveTable:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def begin(self, planner: Planner, needs: Collection[Need]) -> None:
        """See :class:`thence.compare.engine.Watcher`."""
        self.planner, self.needs = planner, list(needs)
        self.ended = {need for need in needs if planner.is_done(need)}
        self.before = len(self.ended)
        self._show(f"{len(needs)} runs, {len(self.ended)} of them are done")

    def progress(self, job: Job, stage: str, done: int, total: int) -> None:
        self.running[job.need] = (stage, done, total)
        self._show()

    def finished(self, job: Job, seconds: float) -> None:
        self.running.pop(job.need, None)
        self.ended.add(job.need)
        self.seconds.setdefault(job.need.arm, []).append(seconds)
        summary = self.planner.summary(job.need) if job.need.arm else None
        score = ""
        if summary is not None:
            column = summary.measured[0]
            score = f": {100 * column.accuracy:.1f}% {column.column.split}, T = {column.column.temperature:g}"
        self._show(f"{title(job.need)}{score} ({duration(seconds)}); {self.left()}")

    def failed(self, need: Need, why: str) -> None:
        self.running.pop(need, None)
        self.failures[need] = why
        self._show(f"failed: {title(need)}: {why.splitlines()[0]}")

    def left(self) -> str:
        """How much is done, and an estimate of the rest from the mean time of the arms so far."""
        done = len(self.ended)
        counted = f"{done} of {len(self.needs)}"
        rest = [need for need in self.needs if need not in self.ended and need not in self.failures]
        known = [value for values in self.seconds.values() for value in values]
        if not known or not rest:
            return counted
        mean = sum(known) / len(known)
        seconds = sum(sum(own) / len(own) if (own := self.seconds.get(need.arm)) else mean for need in rest)
        return f"{counted}, about {duration(seconds / self.jobs)} left"

    def _show(self, line: str = "") -> None:
        if self.live is None:
            if line:
                self.console.print(line, soft_wrap=True, highlight=False, markup=False)
        else:
            self.live.update(self.table(self.planner.recipe))

    def table(self, recipe: ComparisonRecipe) -> Table:
        """The table of arms and bases."""
        bases = list(recipe.bases)
        table = Table(title=f"{recipe.name}: {self.left()}", title_justify="left", caption_justify="left")
        table.add_column("arm", no_wrap=True)
        for base in bases:
            table.add_column(base)
        names = [*([""] if any(not need.arm for need in self.needs) else []), *recipe.arms]
        for name in names:
            if any(need.arm == name for need in self.needs):
                table.add_row(name or "pretraining", *(self._cell(name, base) for base in bases))
        return table

    def _cell(self, arm: str, base: str) -> Text:
        needs = [need for need in self.needs if (need.arm, need.base) == (arm, base)]
        done = sum(need in self.ended for need in needs)
        text = Text(f"{done}/{len(needs)}", style="green" if needs and done == len(needs) else "")
        if failed := sum(need in self.failures for need in needs):
            text.append(f"  {failed} failed", style="red")
        for need in needs:
            if need in self.running:
                stage, at, total = self.running[need]
                share = f" {at}" if total > 100_000 else f" {at}/{total}"
                text.append(f"  seed {need.seed} {stage}{share}", style="dim")
        return text


def title(need: Need) -> str:
    """A run in a few words."""
    name = need.arm or "pretraining"
    tried = f" {need.chosen}" if need.chosen not in (None, "{}") else ""
    return f"{name}{tried} from {need.base}, seed {need.seed}"

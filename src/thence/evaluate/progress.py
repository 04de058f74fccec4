"""The progress of an evaluation."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from thence.evaluate.backends import Generation, Refused
from thence.wording import counted, duration


class EvaluationProgress:
    """Is told of the progress of an evaluation. This one shows nothing."""

    def begin(self, missing: int) -> None:
        """So many samples are missing in all tasks together."""

    def sampling(self, task: str, total: int, done: int) -> None:
        """A task begins, or resumes after ``done`` of ``total`` samples."""

    def sampled(self, generation: Generation) -> None:
        """One more sample is kept."""

    def refused(self, refused: Refused) -> None:
        """One more request got no response, and that is kept."""

    def grading(self, task: str, total: int) -> None:
        """So many samples of a task are about to be graded."""

    def graded(self, task: str) -> None:
        """A task is complete: whatever of it was answered is graded and kept."""


class Terminal(EvaluationProgress):
    """Shows a bar where there is a terminal, else a line every ``seconds``: samples, tokens a second, time left.

    The time that is left is for the samples of all tasks. Samples may end in bursts (a wave of rows at a time), so
    lines are printed by the clock and not by the sample, and speed is measured up to the last sample.
    """

    def __init__(self, console: Console, seconds: float = 5.0):
        self.console, self.seconds = console, seconds
        self.name, self.total, self.done, self.missing = "", 0, 0, 0
        self.made = self.tokens = self.printed = 0
        self.started = self.last = time.monotonic()
        columns = [TextColumn("{task.description:<16}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn()]
        self.bar = Progress(*columns, TextColumn("{task.fields[facts]}", markup=False), console=console)
        self.task: TaskID | None = None
        self._closed = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Terminal:
        if self.console.is_terminal:
            self.bar.start()
        else:
            self._clock.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self.console.is_terminal:
            self.bar.stop()
        else:
            self._clock.join()

    def begin(self, missing: int) -> None:
        self.missing = missing

    def sampling(self, task: str, total: int, done: int) -> None:
        self.name, self.total, self.done = task, total, done
        if not self.made:
            self.started = time.monotonic()  # loading the model is not sampling
        if self.console.is_terminal:
            self.task = self.bar.add_task(task, total=total, completed=done, facts="")
        elif done < total:
            begun = f"resumed after {done:,} of {total:,} samples" if done else counted(total, "sample")
            self.console.print(f"{task}: {begun}", highlight=False)

    def sampled(self, generation: Generation) -> None:
        self.made, self.last = self.made + 1, time.monotonic()
        self.tokens += generation.tokens or 0
        self._advance()

    def refused(self, refused: Refused) -> None:
        self.missing = max(0, self.missing - 1)
        self._advance()

    def _advance(self) -> None:
        self.done += 1
        if self.console.is_terminal and self.task is not None:
            self.bar.update(self.task, completed=self.done, facts=self._facts())
        elif self.done == self.total:
            self._line()

    def grading(self, task: str, total: int) -> None:
        if not self.console.is_terminal:
            self.console.print(f"{task}: grading {counted(total, 'sample')}", highlight=False)

    def _tick(self) -> None:
        while not self._closed.wait(self.seconds):
            if self.made != self.printed:
                self._line()

    def _line(self) -> None:
        self.printed = self.made
        self.console.print(f"{self.name} {self.done:,}/{self.total:,}  {self._facts()}", highlight=False)

    def _facts(self) -> str:
        seconds = max(self.last - self.started, 1e-9)
        speed = f"{self.tokens / seconds:,.0f} tok/s  {self.tokens / self.made:,.0f} tok each  " if self.tokens else ""
        return f"{speed}{duration(seconds / max(1, self.made) * max(0, self.missing - self.made))} left"

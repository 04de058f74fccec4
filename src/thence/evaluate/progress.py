"""The progress of an evaluation."""

from __future__ import annotations

import threading
import time
from typing import Self

from rich.console import Console

from thence.display import BarDisplay
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


class EvaluationDisplay(BarDisplay, EvaluationProgress):
    """Shows a bar where there is a terminal, else a line every ``seconds``: samples, tokens a second, time left.

    The time that is left is for the samples of all tasks. Samples may end in bursts (a wave of rows at a time), so
    lines are printed by the clock and not by the sample, and speed is measured up to the last sample.
    """

    def __init__(self, console: Console, seconds: float = 5.0):
        super().__init__(console, seconds, 16)
        self.missing = self.made = self.tokens = self.printed = 0
        self.started = self.last = time.monotonic()
        self._closed = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Self:
        if not self.animated:
            self._clock.start()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        if not self.animated:
            self._clock.join()
        super().__exit__(*error)

    def begin(self, missing: int) -> None:
        self.missing = missing

    def sampling(self, task: str, total: int, done: int) -> None:
        if not self.made:
            self.started = time.monotonic()  # loading the model is not sampling
        self.start_task(task, total, done)
        if done < total:
            begun = f"resumed after {done:,} of {total:,} samples" if done else counted(total, "sample")
            self.line(f"{task}: {begun}")

    def sampled(self, generation: Generation) -> None:
        self.made, self.last = self.made + 1, time.monotonic()
        self.tokens += generation.tokens or 0
        self._advance()

    def refused(self, refused: Refused) -> None:
        self.missing = max(0, self.missing - 1)
        self._advance()

    def _advance(self) -> None:
        self.done += 1
        if not self.redraw(self._facts()) and self.done == self.total:
            self._speed_line()

    def grading(self, task: str, total: int) -> None:
        self.line(f"{task}: grading {counted(total, 'sample')}")

    def _tick(self) -> None:
        while not self._closed.wait(self.seconds):
            if self.made != self.printed:
                self._speed_line()

    def _speed_line(self) -> None:
        self.printed = self.made
        self.line(f"{self.name} {self.done:,}/{self.total:,}  {self._facts()}")

    def _facts(self) -> str:
        seconds = max(self.last - self.started, 1e-9)
        speed = f"{self.tokens / seconds:,.0f} tok/s  {self.tokens / self.made:,.0f} tok each  " if self.tokens else ""
        return f"{speed}{duration(seconds / max(1, self.made) * max(0, self.missing - self.made))} left"

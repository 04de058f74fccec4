"""The progress of an evaluation."""

from __future__ import annotations

import threading
import time
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from thence.display import Display, SideBySide, bar_line
from thence.evaluate.backends import Generation, Refused
from thence.wording import counted, duration

REFRESHES = 4  # a second


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


class EvaluationDisplay(Display, EvaluationProgress):
    """Shows a panel where there is a terminal, else a line every ``seconds``: samples, tokens a second, time left.

    The time that is left is for the samples of all tasks. Samples may end in bursts (a wave of rows at a time), so
    lines are printed by the clock and not by the sample, and speed is measured up to the last sample. A task that has
    ended leaves a line behind.

    Args:
        seconds: between two lines.
        doing: what goes on before the first task, in words.
    """

    def __init__(self, console: Console, seconds: float = 5.0, doing: str = ""):
        self.seconds, self.name, self.total, self.done, self.now = seconds, "", 0, 0, doing
        self.missing = self.made = self.tokens = self.printed = 0
        self.started = self.last = self.began = time.monotonic()
        self._closed = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)
        picture = Live(console=console, refresh_per_second=REFRESHES, transient=True, get_renderable=self._panel)
        super().__init__(console, picture)

    def __enter__(self) -> Self:
        if not self.animated:
            self._clock.start()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        if not self.animated:
            self._clock.join()
        super().__exit__(*error)
        self._end_task()

    def begin(self, missing: int) -> None:
        self.missing = missing
        if not missing:
            self.line("every sample is here already: nothing is asked")

    def sampling(self, task: str, total: int, done: int) -> None:
        self._end_task()
        self.began = time.monotonic()
        if not self.made:
            self.started = self.began  # loading the model is not sampling
        self.name, self.total, self.done, self.now = task, total, done, ""
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
        if not self.animated and self.done == self.total:
            self._speed_line()

    def grading(self, task: str, total: int) -> None:
        self.now = f"checking {counted(total, 'answer')} ..."
        self.line(f"{task}: grading {counted(total, 'sample')}")

    def graded(self, task: str) -> None:
        self._end_task()
        self.now = ""

    def _end_task(self) -> None:
        """A line of what a task was, above the panel."""
        name, self.name = self.name, ""
        if name and self.animated:
            took = f"in {duration(time.monotonic() - self.began)}"
            self.console.print(SideBySide([f"{name} {self.done:,}/{self.total:,}", *self._speed(), took]))

    def _tick(self) -> None:
        while not self._closed.wait(self.seconds):
            if self.made != self.printed:
                self._speed_line()

    def _speed_line(self) -> None:
        self.printed = self.made
        said = "  ".join([*self._speed(), self._left()])
        self.line(f"{self.name} {self.done:,}/{self.total:,}  {said}", wrap=False)

    def _speed(self) -> list[str]:
        seconds = max(self.last - self.started, 1e-9)
        return (
            [f"{self.tokens / seconds:,.0f} tok/s", f"{self.tokens / self.made:,.0f} tok each"] if self.tokens else []
        )

    def _left(self) -> str:
        seconds = max(self.last - self.started, 1e-9)
        return f"{duration(seconds / max(1, self.made) * max(0, self.missing - self.made))} left"

    def _panel(self) -> Group:
        head = [Text(self.name, "bold")] if self.name else []
        parts: list[RenderableType] = [SideBySide([*head, Text(self.now)])] if self.now else [*head]
        if self.name:
            parts.append(bar_line(self.done, self.total, self._left() if self.made else ""))
            if speed := self._speed():
                parts.append(SideBySide(speed))
        return Group(*parts)

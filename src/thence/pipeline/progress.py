"""What a run shows while it goes: a bar on a terminal, one plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from thence.wording import counted

SHOWN = (
    ("loss", "loss {:.3f}"),
    ("held_out_loss", "held-out {:.3f}"),
    ("reward", "reward {:.3f}"),
    ("entropy", "entropy {:.2f}"),
    ("response_tokens", "length {:.0f}"),
    ("grad_norm", "norm {:.2f}"),
    ("tokens_per_s", "{:,.0f} tok/s"),
)


class RunWatcher(Protocol):
    """Is told what happens in a run."""

    def stage(self, name: str, total: int, done: int) -> None:
        """A stage begins, or is resumed after ``done`` of ``total`` steps."""
        ...

    def step(self, facts: Mapping[str, Any]) -> None:
        """One step is done."""
        ...


class NullWatcher:
    """Shows nothing; what the other ranks and Python callers use."""

    def stage(self, name: str, total: int, done: int) -> None:
        pass

    def step(self, facts: Mapping[str, Any]) -> None:
        pass


class Terminal:
    """Shows a bar where there is a terminal, else a line every ``seconds``."""

    def __init__(self, console: Console, seconds: float = 5.0):
        self.console, self.seconds = console, seconds
        self.total = self.done = 0
        self.name, self.last = "", 0.0
        columns = [TextColumn("{task.description:<10}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn()]
        self.bar = Progress(
            *columns,
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
            console=console,
            transient=False,
        )
        self.task: TaskID | None = None

    def __enter__(self) -> Terminal:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def stage(self, name: str, total: int, done: int) -> None:
        self.name, self.total, self.done, self.last = name, total, done, time.monotonic()
        if self.console.is_terminal:
            self.task = self.bar.add_task(name, total=total, completed=done, facts="")
        else:
            self.console.print(
                f"{name}: " + (f"resumed after step {done} of {total}" if done else counted(total, "step"))
            )

    def step(self, facts: Mapping[str, Any]) -> None:
        self.done += 1
        text = "  ".join(pattern.format(facts[key]) for key, pattern in SHOWN if facts.get(key) is not None)
        if self.console.is_terminal and self.task is not None:
            self.bar.update(self.task, completed=self.done, facts=text)
        elif time.monotonic() - self.last >= self.seconds or self.done == self.total:
            self.last = time.monotonic()
            self.console.print(f"{self.name} {self.done}/{self.total}  {text}", highlight=False)

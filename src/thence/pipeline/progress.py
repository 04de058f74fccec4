"""What a run shows while it goes: a bar on a terminal, one plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.progress import TimeRemainingColumn

from thence.display import BarDisplay
from thence.wording import counted

SHOWN = (
    ("loss", "loss {:.3f}"),
    ("held_out_loss", "held-out {:.3f}"),
    ("eval", "eval {:.3f}"),
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


class RunDisplay(BarDisplay):
    """Shows a bar where there is a terminal, else a line every ``seconds``."""

    def __init__(self, console: Console, seconds: float = 5.0):
        super().__init__(console, seconds, 10, TimeRemainingColumn())
        self.last = 0.0

    def stage(self, name: str, total: int, done: int) -> None:
        self.last = time.monotonic()
        self.start_task(name, total, done)
        self.line(f"{name}: " + (f"resumed after step {done} of {total}" if done else counted(total, "step")))

    def step(self, facts: Mapping[str, Any]) -> None:
        self.done += 1
        text = "  ".join(pattern.format(facts[key]) for key, pattern in SHOWN if facts.get(key) is not None)
        if self.redraw(text):
            return
        if time.monotonic() - self.last >= self.seconds or self.done == self.total:
            self.last = time.monotonic()
            self.line(f"{self.name} {self.done}/{self.total}  {text}")

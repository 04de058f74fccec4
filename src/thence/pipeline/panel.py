"""What a run shows while it goes: one panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from thence.display import Display, SideBySide, bar_line
from thence.pipeline.time_left import Clock
from thence.wording import counted, duration

if TYPE_CHECKING:
    from thence.pipeline.foreseen import Foreseen

SHOWN = (
    ("loss", "loss {:.3f}"),
    ("held_out_loss", "held-out {:.3f}"),
    ("eval", "eval {:.3f}"),
    ("reward", "reward {:.3f}"),
    ("entropy", "entropy {:.2f}"),
    ("response_tokens", "length {:.0f}"),
    ("grad_norm", "norm {:.2f}"),
    ("tokens_per_s", "{:,.0f} tok/s"),
    ("waited_share", "waited {:.0%}"),
    ("unused_tokens", "{:,.0f} sampled tokens unused"),
    ("wasted_tokens", "{:,.0f} tokens sampled in vain"),
)
REFRESHES = 4  # a second


def said_of(facts: Mapping[str, Any]) -> list[str]:
    """The quantities of a step that people look at, in words."""
    return [pattern.format(facts[key]) for key, pattern in SHOWN if facts.get(key) is not None]


class RunDisplay(Display):
    """Shows a panel on a terminal: run, stage, time left, the last step. Elsewhere it prints a line every ``seconds``.

    The panel takes the width that there is and wraps; it cuts nothing. A stage that has ended leaves a line behind.
    """

    def __init__(self, console: Console, seconds: float = 5.0):
        self.seconds, self.last = seconds, time.monotonic()
        self.clock = Clock()
        self.run, self.stages, self.now = "", 0, ""
        self.facts: list[str] = []
        picture = Live(console=console, refresh_per_second=REFRESHES, transient=True, get_renderable=self._panel)
        super().__init__(console, picture)

    def __exit__(self, *error: object) -> None:
        self._end_stage()
        self.now = ""
        super().__exit__(*error)

    def begin(self, name: str, stages: Sequence[str]) -> None:
        self.run, self.stages = name, len(stages)
        self.clock.begin(stages)

    def planned(self, foreseen: Foreseen) -> None:
        self.console.print(str(foreseen), soft_wrap=not self.animated, highlight=False, markup=False)

    def doing(self, what: str) -> None:
        self._end_stage()
        self.now = what
        self.line(f"{what} ...", wrap=False)

    def stage(self, name: str, total: int, done: int) -> None:
        self._end_stage()
        self.last = time.monotonic()
        self.now, self.facts = "", []
        self.clock.stage(name, total, done, self.last)
        if self.animated:
            self.picture.refresh()
        self.line(
            f"{name}: " + (f"resumed after step {done} of {total}" if done else counted(total, "step")), wrap=False
        )

    def step(self, facts: Mapping[str, Any]) -> None:
        now, clock = time.monotonic(), self.clock
        clock.step(now)
        self.facts = said_of(facts)
        if not self.animated and (now - self.last >= self.seconds or clock.done == clock.total):
            self.last = now
            left = str(clock.left(now)) if clock.done < clock.total else ""
            told = "  ".join(filter(None, [*self.facts, left]))
            self.line(f"{clock.name} {clock.done}/{clock.total}  {told}", wrap=False)

    def _end_stage(self) -> None:
        """A line of what a stage was, above the panel."""
        name, done, total = self.clock.name, self.clock.done, self.clock.total
        took = self.clock.end(time.monotonic())
        if took is not None and self.animated and self.facts:
            self.console.print(SideBySide([f"{name} {done}/{total}", *self.facts, f"in {duration(took)}"]))

    def _panel(self) -> Group:
        clock = self.clock
        left = clock.left(time.monotonic())
        place = self.stages - len(clock.to_come) if clock.name else 0
        now = f"stage {place} of {self.stages}: {clock.name}" if place else f"{self.now} ..." if self.now else ""
        head = [Text(self.run, "bold")] if self.run else []  # it has none before its recipe has been tried
        parts: list[Any] = [SideBySide([*head, *([Text(now)] if now else [])])] if head or now else []
        if clock.name:
            stage = "" if left.stage is None else f"{duration(left.stage)} left of this stage"
            parts.append(bar_line(clock.done, clock.total, stage))
        if self.facts:
            parts.append(SideBySide(self.facts))
        if str(left) and (clock.to_come or not clock.name):
            parts.append(Text(f"whole run: {left}", style="dim"))
        return Group(*parts)

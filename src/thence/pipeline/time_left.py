"""How long a run will still take, as far as that can be known from what it has done."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from thence.recipe import kind_of
from thence.wording import duration

WINDOW = 20
"""Steps that the speed of a stage is measured over."""
FIRST = 3
"""Steps after which a stage's own time is foreseen."""


@dataclass(frozen=True)
class Clocked:
    """A stage that has ended, or its steps in this process.

    Args:
        steps: taken here.
        foreseen: seconds that the first three steps let expect for so many.
        took: seconds from the stage's begin to the last of these steps.
    """

    steps: int
    foreseen: float
    took: float


@dataclass(frozen=True)
class Remaining:
    """Time that is left.

    Args:
        stage: of the stage that runs, seconds; None before its first step and between two stages.
        known: of that stage and of the later ones whose speed is known, seconds; None where nothing is known.
        unknown: later stages that nothing is known of, since none of their kind has run yet.
    """

    stage: float | None
    known: float | None
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.known is None:
            return ""
        more = f" and {', '.join(self.unknown)}" if self.unknown else ""
        return f"about {duration(self.known)}{more} left"


class Clock:
    """Measures the stages of a run and says what is left.

    A later stage is expected to take as long as the last one of its kind in this process took. A stage of a kind that
    has not run yet is not guessed: it is named.
    """

    def __init__(self) -> None:
        self.to_come: list[str] = []
        self.name, self.total, self.done = "", 0, 0
        self._began, self._first = 0.0, 0
        self._ends: deque[float] = deque(maxlen=WINDOW + 1)
        self._took: dict[str, float] = {}
        """Seconds of a whole stage, by kind."""
        self._starts: list[float] = []
        """When the stage began, and the ends of its first steps here."""
        self.times: dict[str, Clocked] = {}
        """Stages that have taken more steps here than their time was foreseen from."""

    def begin(self, stages: Sequence[str]) -> None:
        """The stages that are not done, in order."""
        self.to_come = list(stages)

    def stage(self, name: str, total: int, done: int, now: float) -> None:
        """A stage begins after ``done`` of ``total`` steps."""
        self.end(now)
        self.name, self.total, self.done, self._began = name, total, done, now
        self._first = done
        self._starts = [now]
        self._ends = deque([now], maxlen=WINDOW + 1)  # a new one: another thread may be reading the old one
        if name in self.to_come:
            self.to_come = self.to_come[self.to_come.index(name) + 1 :]

    def step(self, now: float) -> None:
        """One more step is done."""
        self.done += 1
        self._ends.append(now)
        if len(self._starts) <= FIRST:
            self._starts.append(now)

    def foreseen(self, steps: int) -> float | None:
        """Seconds that so many steps of this stage take, by its first three; None: they have not been taken.

        The first one may make kernels and memory ready, so it counts once, and the two after it for all others.
        """
        if len(self._starts) <= FIRST:
            return None
        began, first, *_, last = self._starts
        return first - began + (steps - 1) * (last - first) / (FIRST - 1)

    def end(self, now: float) -> float | None:
        """The stage has ended. Returns the seconds that it took here; None where none ran."""
        if not self.name:
            return None
        took, here = now - self._began, self.done - self._first
        expected = self.foreseen(here)
        if expected is not None and here > FIRST:
            self.times[self.name] = Clocked(here, expected, self._ends[-1] - self._began)
        if here:  # a stage that was resumed counts as if it had run here from its first step
            self._took[kind_of(self.name)] = took / here * self.done
        self.name = ""
        return took

    def left(self, now: float) -> Remaining:
        """What is left now."""
        stage = None
        ends = list(self._ends)
        if self.name and len(ends) > 1:
            each = (ends[-1] - ends[0]) / (len(ends) - 1)
            stage = max(0.0, each * (self.total - self.done) - (now - ends[-1]))
        later = [self._took.get(kind_of(name)) for name in self.to_come]
        unknown = tuple(name for name, took in zip(self.to_come, later, strict=True) if took is None)
        known = [took for took in later if took is not None]
        if stage is None and (self.name or not known):  # of a stage before its first step nothing is known
            return Remaining(None, None, unknown)
        return Remaining(stage, (stage or 0.0) + sum(known), unknown)

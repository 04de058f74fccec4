"""Who is told what happens in a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from thence.files import to_json, write_atomically
from thence.pipeline.time_left import FIRST, Clock
from thence.wording import duration

if TYPE_CHECKING:
    from thence.pipeline.foreseen import Foreseen

log = logging.getLogger(__name__)
PROGRESS = "progress.json"
WRITTEN_EVERY = 1.0  # seconds
WORTH_SAYING = 60.0
"""Seconds of a stage from which its foreseen time is said."""


class RunWatcher(Protocol):
    """Is told what happens in a run."""

    def begin(self, name: str, stages: Sequence[str]) -> None:
        """The run begins, or is resumed, with these stages to go."""
        ...

    def planned(self, foreseen: Foreseen) -> None:
        """What the stages to go are planned to cost; told once after :meth:`begin`, unless no plan could be made."""
        ...

    def doing(self, what: str) -> None:
        """What goes on before the steps of a stage, which may take a while."""
        ...

    def stage(self, name: str, total: int, done: int) -> None:
        """A stage begins, or is resumed after ``done`` of ``total`` steps."""
        ...

    def step(self, facts: Mapping[str, Any]) -> None:
        """One step is done."""
        ...


class NullWatcher:
    """Shows nothing; what the other ranks and Python callers use."""

    def begin(self, name: str, stages: Sequence[str]) -> None:
        pass

    def planned(self, foreseen: Foreseen) -> None:
        pass

    def doing(self, what: str) -> None:
        pass

    def stage(self, name: str, total: int, done: int) -> None:
        pass

    def step(self, facts: Mapping[str, Any]) -> None:
        pass


class ProgressFile:
    """Tells a watcher, and keeps ``progress.json`` in the run's folder for `thence watch`: where the run is.

    The file is written once a second at most. Nothing depends on it.

    Args:
        folder: the run's.
    """

    def __init__(self, watcher: RunWatcher, folder: Path):
        self.watcher, self.file = watcher, folder / PROGRESS
        self.facts: dict[str, Any] = {}
        self.written = -WRITTEN_EVERY
        self.clock = Clock()

    def begin(self, name: str, stages: Sequence[str]) -> None:
        self.facts = {"run": name, "to_go": list(stages)}
        self.clock.begin(stages)
        self.watcher.begin(name, stages)

    def planned(self, foreseen: Foreseen) -> None:
        self.watcher.planned(foreseen)

    def doing(self, what: str) -> None:
        self.facts |= {"doing": what}
        self.clock.end(time.monotonic())
        self._write()
        self.watcher.doing(what)

    def stage(self, name: str, total: int, done: int) -> None:
        self.facts |= {"stage": name, "total": total, "done": done, "doing": None, "began": time.time()}
        self.facts["first"] = done
        self.clock.stage(name, total, done, time.monotonic())
        self._write()
        self.watcher.stage(name, total, done)

    def step(self, facts: Mapping[str, Any]) -> None:
        self.facts["done"] = self.facts.get("done", 0) + 1
        self.clock.step(time.monotonic())
        if self.clock.done - self.facts.get("first", 0) == FIRST:
            self._say_how_long()
        if time.monotonic() - self.written >= WRITTEN_EVERY or self.facts["done"] == self.facts.get("total"):
            self._write()
        self.watcher.step(facts)

    def end(self) -> None:
        """The run has ended."""
        self.clock.end(time.monotonic())
        self._write()

    def _say_how_long(self) -> None:
        """Log how long the stage will take by its first steps, where that is worth saying."""
        steps = self.clock.total - self.facts.get("first", 0)
        expected = self.clock.foreseen(steps)
        if expected is not None and expected >= WORTH_SAYING and steps > FIRST:
            which = "" if not self.facts.get("first") else " that are left"
            said = (self.clock.name, duration(expected), steps, which, FIRST)
            log.info("%s: about %s for %d steps%s, by the first %d", *said)

    def _write(self) -> None:
        self.written = time.monotonic()
        with suppress(OSError):  # a full disk ends the run where something is lost by it
            left = self.clock.left(self.written)
            times = {name: asdict(found) for name, found in self.clock.times.items()}
            told: dict[str, Any] = {"times": times} if times else {}
            told |= {"left": {"seconds": left.known, "unknown": left.unknown}, "at": time.time()}
            write_atomically(self.file, to_json(self.facts | told))

"""Who is told what happens in a run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from thence.files import to_json, write_atomically
from thence.pipeline.time_left import Clock

PROGRESS = "progress.json"
WRITTEN_EVERY = 1.0  # seconds


class RunWatcher(Protocol):
    """Is told what happens in a run."""

    def begin(self, name: str, stages: Sequence[str]) -> None:
        """The run begins, or is resumed, with these stages to go."""
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
        if time.monotonic() - self.written >= WRITTEN_EVERY or self.facts["done"] == self.facts.get("total"):
            self._write()
        self.watcher.step(facts)

    def _write(self) -> None:
        self.written = time.monotonic()
        with suppress(OSError):  # a full disk ends the run where something is lost by it
            left = self.clock.left(self.written)
            told = {"left": {"seconds": left.known, "unknown": left.unknown}, "at": time.time()}
            write_atomically(self.file, to_json(self.facts | told))

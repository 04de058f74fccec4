"""Kills its own process with SIGKILL at a chosen change of a file: nothing can be cleaned up or flushed.

Every change below a folder (a file opened for writing, flushed, renamed, removed; a folder made or removed) is an event
of CPython's audit hooks, so nothing in the product knows of this. A process counts its events; a plan says at which one
it dies, and how: before the change, or with a part of the file written.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VARIABLE = "THENCE_CHAOS_PLAN"
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")
HALF = '{"stage": "sft", "step": 1, "lo'  # what a killed process leaves of a line, or of a whole file


@dataclass(frozen=True)
class Plan:
    """When a process dies.

    Args:
        root: changes below this folder count.
        kind: changes of this kind count; None: all.
        count: it dies at the so manyth, counted from 1; 0: never, it only keeps a record.
        torn: a file that is opened for writing gets half of a line first.
        record: a file that gets the kind of every change, one a line.
    """

    root: str
    kind: str | None = None
    count: int = 0
    torn: bool = False
    record: str | None = None


def deaths(root: str) -> str:
    """The file beside a folder in which every process that dies by plan says so."""
    return f"{root}.deaths"


def kind_of(event: str, path: str) -> str:
    """What a change is: the event and the name of the file without its numbers, ``rename .writing-N``."""
    return f"{event.rpartition('.')[2]} {re.sub(r'[0-9a-f]{6,}|[0-9]+', 'N', Path(path).name)}"


def arm(plan: Plan) -> None:
    """Let this process die as planned. Cannot be undone."""
    fate = _Fate(plan)

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if (event == "open" and _writes(given)) or event in CHANGES:
            fate.change(event, given)

    flush = os.fsync

    def fsync(handle: Any) -> None:
        number = handle if isinstance(handle, int) else handle.fileno()
        fate.change("fsync", (str(Path(f"/proc/self/fd/{number}").readlink()),))
        flush(handle)

    sys.addaudithook(hook)
    os.fsync = fsync


class _Fate:
    def __init__(self, plan: Plan):
        self.plan, self.seen, self.busy = plan, 0, False

    def change(self, event: str, given: tuple[Any, ...]) -> None:
        path = _path(given)
        if self.busy or path is None or not path.startswith(self.plan.root + os.sep):
            return
        kind = kind_of(event, path)
        if self.plan.record:
            self._quietly(lambda: _append(self.plan.record or "", kind + "\n"))
        if self.plan.kind not in (None, kind):
            return
        self.seen += 1
        if self.seen == self.plan.count:
            if self.plan.torn and event == "open":
                self._quietly(lambda: _append(path, HALF))
            self._quietly(lambda: _append(deaths(self.plan.root), kind + "\n"))
            os.kill(os.getpid(), signal.SIGKILL)

    def _quietly(self, act: Callable[[], None]) -> None:
        self.busy = True
        try:
            act()
        finally:
            self.busy = False


def _writes(given: tuple[Any, ...]) -> bool:
    flags = given[2] if len(given) > 2 and isinstance(given[2], int) else 0
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) and not str(given[0]).endswith(".lock")


def _path(given: tuple[Any, ...]) -> str | None:
    """The absolute path that an event is about; one relative to an open folder is joined to it."""
    if not given or not isinstance(given[0], (str, bytes, os.PathLike)):
        return None
    path = os.fsdecode(given[0])
    if not Path(path).is_absolute() and len(given) > 1 and isinstance(given[-1], int) and given[-1] > 2:
        try:
            path = str(Path(f"/proc/self/fd/{given[-1]}").readlink() / path)
        except OSError:
            return None
    return os.path.abspath(path)  # noqa: PTH100


def _append(path: str, text: str) -> None:
    with open(path, "a", encoding="utf-8") as file:  # noqa: PTH123
        file.write(text)


def plan_to_text(plan: Plan, whose: str) -> str:
    """The plan for a process that finds it in its environment.

    Args:
        whose: a text that the command of the process that dies has in it; other processes live.
    """
    return json.dumps({"whose": whose, **asdict(plan)})


def arm_from_environment() -> None:
    """Arm this process if the environment says so, and means it."""
    if text := os.environ.get(VARIABLE):
        given = json.loads(text)
        if given.pop("whose") in " ".join(sys.orig_argv):
            arm(Plan(**given))

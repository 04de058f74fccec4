"""A process that runs one job after the other, and never outlives the comparison that started it.

Messages are framed (:mod:`thence.framed`): jobs come on standard input; ``{"progress": ...}``, ``{"done": ...}`` and
``{"failed": ...}`` go out on standard output. Whatever libraries print goes to standard error.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from thence.framed import pack, read
from thence.streams import guarded

if TYPE_CHECKING:
    from thence.pipeline.foreseen import Foreseen
    from thence.pipeline.prompts import RenderedPrompts

PROGRESS_EVERY = 1.0  # seconds


class JobWatcher:
    """A watcher of a run: tells the comparison which step a job has reached."""

    def __init__(self, out: BinaryIO):
        self.out, self.stage_name, self.total, self.done, self.told = out, "", 0, 0, 0.0

    def tell(self, **message: Any) -> None:
        """Send one message."""
        self.out.write(pack(message))
        self.out.flush()

    def begin(self, name: str, stages: Sequence[str]) -> None:
        pass

    def planned(self, foreseen: Foreseen) -> None:
        pass

    def doing(self, what: str) -> None:
        pass

    def stage(self, name: str, total: int, done: int) -> None:
        self.stage_name, self.total, self.done = name, total, done
        self.tell(progress=[name, done, total])

    def step(self, facts: Mapping[str, Any]) -> None:
        import time

        self.done += 1
        if time.monotonic() - self.told > PROGRESS_EVERY:
            self.told = time.monotonic()
            self.tell(progress=[self.stage_name, self.done, self.total])


def main() -> None:
    """Run jobs until standard input ends; then end at once, in the middle of a job too."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    jobs: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    with guarded():
        from thence.pipeline.prompts import RenderedPrompts  # whatever libraries print now goes to standard error

        prompts = RenderedPrompts()  # of all jobs
        while True:
            _work(jobs.get(), JobWatcher(out), prompts)


def _listen(jobs: queue.Queue[dict[str, Any]]) -> None:
    while (tables := read(sys.stdin.buffer)) is not None:
        jobs.put(tables)
    os._exit(0)  # a run can be killed at any moment and taken up again


def _work(tables: dict[str, Any], watcher: JobWatcher, prompts: RenderedPrompts) -> None:
    from thence.compare.summary import summarise
    from thence.errors import UserError
    from thence.explain import foreign_exit, told
    from thence.pipeline.run import run

    try:
        folder = run(tables, watcher=watcher, keep_last=False, prompts=prompts)
        if "eval" in tables["stages"]:
            summarise(Path(folder))
    except SystemExit as error:
        traceback.print_exc()
        watcher.tell(failed=str(foreign_exit(error)))
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()  # into the worker's log
        watcher.tell(failed=told(error))
    else:
        watcher.tell(done=True)


if __name__ == "__main__":
    main()

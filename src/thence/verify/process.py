"""The parent's side of one worker process: start it, send it a text, collect its grade, end it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import thence
from thence.verify.protocol import Inbox, pack

START_SECONDS = 120.0
ALARM_MARGIN = 2.0  # the worker's own alarm comes after the parent's limit, which is the one that is reported
KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "LANG", "LC_ALL", "TMPDIR")


class WorkerProcess:
    """One process that grades one text at a time. Reading and writing never block."""

    def __init__(self, seconds: float, memory_mb: int):
        command = [sys.executable, "-P", "-m", "thence.verify.worker", str(memory_mb), str(seconds + ALARM_MARGIN)]
        # A session of its own: Ctrl-C at the terminal is the parent's to handle, which then ends the worker.
        self._popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            start_new_session=True,
            bufsize=0,
        )
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self.input, self.output = self._popen.stdin.fileno(), self._popen.stdout.fileno()
        os.set_blocking(self.input, False)
        os.set_blocking(self.output, False)
        self.pid = self._popen.pid
        self.ready = False
        self.task: int | None = None
        self.deadline = time.monotonic() + START_SECONDS
        self._seconds = seconds
        self._inbox = Inbox()
        self._unsent = memoryview(b"")

    @property
    def idle(self) -> bool:
        """Whether it can take a text now."""
        return self.ready and self.task is None

    @property
    def sending(self) -> bool:
        """Whether part of the text is still to be written."""
        return len(self._unsent) > 0

    def dead(self) -> bool:
        """Whether the process has ended."""
        return self._popen.poll() is not None

    def begin(self, task: int, text: str, answer: str) -> None:
        """Start on a text; its time runs from now. `task` is the caller's name for it."""
        self.task = task
        self.deadline = time.monotonic() + self._seconds
        self._unsent = memoryview(pack({"text": text, "answer": answer}))

    def write(self) -> None:
        """Write as much of the text as the pipe takes. A process that is gone shows when its output is read."""
        try:
            self._unsent = self._unsent[os.write(self.input, self._unsent) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._unsent = memoryview(b"")

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have arrived. Raises EOFError when the process has closed its output."""
        try:
            piece = os.read(self.output, 1 << 16)
        except BlockingIOError:
            return []
        if not piece:
            raise EOFError
        return self._inbox.feed(piece)

    def ending(self) -> str:
        """How the process ended, for people: a signal's name or an exit code. Waits for it."""
        code = self._popen.wait()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        """End the process at once and close its pipes. Harmless when it has ended already."""
        self._popen.kill()
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                pipe.close()


def _environment() -> dict[str, str]:
    """Only what Python needs to start: tokens and keys stay away from code that reads a model's output."""
    kept = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
    root = str(Path(thence.__file__).resolve().parent.parent)
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    # A fixed hash seed: the order of sets inside sympy, and with it a verdict at the edge, repeats.
    return kept | {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}

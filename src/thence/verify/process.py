"""The parent's side of a process that checks answers: start it, send it a text, collect its grade, end it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import thence
from thence.framed import Inbox, pack

START_SECONDS = 120.0
ALARM_MARGIN = 2.0  # the worker's own alarm comes after the parent's limit, which is the one that is reported
KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "LANG", "LC_ALL", "TMPDIR")


class ChildProcess:
    """A process that is sent messages and sends messages back. Reading and writing never block.

    Args:
        command, environment: what to start, and its environment.
        stderr: where its standard error goes; None: where this process's goes.
        seconds: time that it has to say that it is ready.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], stderr: int | None, seconds: float):
        # A new session: the parent handles Ctrl-C at the terminal, and then ends the child.
        self._popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
            start_new_session=True,
            bufsize=0,
        )
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self.input, self.output = self._popen.stdin.fileno(), self._popen.stdout.fileno()
        os.set_blocking(self.input, False)
        os.set_blocking(self.output, False)
        self.pid = self._popen.pid
        self.deadline = time.monotonic() + seconds
        self._inbox = Inbox()
        self._unsent = memoryview(b"")

    @property
    def sending(self) -> bool:
        """Whether part of a message is still to be written."""
        return len(self._unsent) > 0

    def dead(self) -> bool:
        """Whether the process has ended."""
        return self._popen.poll() is not None

    def send(self, message: dict[str, Any], seconds: float) -> None:
        """Begin to send a message; the time for its answer runs from now. `write` does the sending."""
        self.deadline = time.monotonic() + seconds
        self._unsent = memoryview(pack(message))

    def write(self) -> None:
        """Write as much of the message as the pipe takes. A process that is gone shows when its output is read."""
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

    def ending(self, seconds: float | None = None) -> str:
        """How the process ended, for people: a signal's name or an exit code. Waits for it.

        Raises:
            subprocess.TimeoutExpired: it has not ended after so many seconds.
        """
        code = self._popen.wait(seconds)
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def leave(self, seconds: float) -> None:
        """Close its input, which ends it, and wait so long for it; then end it at once."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(seconds)
        self.kill()

    def kill(self) -> None:
        """End the process at once and close its pipes. Harmless when it has ended already."""
        self._popen.kill()
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                pipe.close()


class WorkerProcess(ChildProcess):
    """One process that grades one text at a time."""

    def __init__(self, seconds: float, memory_mb: int):
        command = [sys.executable, "-P", "-m", "thence.verify.worker", str(memory_mb), str(seconds + ALARM_MARGIN)]
        super().__init__(command, _environment(), subprocess.DEVNULL, START_SECONDS)
        self.ready = False
        self.task: int | None = None
        self._seconds = seconds

    @property
    def idle(self) -> bool:
        """Whether it can take a text now."""
        return self.ready and self.task is None

    def begin(self, task: int, text: str, answer: str) -> None:
        """Start on a text; its time runs from now. `task` is the caller's name for it."""
        self.task = task
        self.send({"text": text, "answer": answer}, self._seconds)


def _environment() -> dict[str, str]:
    """Only what Python needs to start: tokens and keys stay away from code that reads a model's output."""
    kept = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
    root = str(Path(thence.__file__).resolve().parent.parent)
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    # A fixed hash seed: the order of sets inside sympy, and with it a verdict at the edge, repeats.
    return kept | {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}

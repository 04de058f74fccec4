"""A process that runs jobs one at a time and talks in framed messages, wherever it runs.

It ends when its standard input ends, so it never outlives whoever started it, in whatever way that ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from thence.framed import Inbox, pack
from thence.redaction import redacted

KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
"""For glibc, others ignore it: the large tensors that come and go in every step keep their memory, which would else be
given back to the system and zeroed anew each time."""
LOG_TAIL = 2000  # characters of a dead process's log that are shown
PIECE = 1 << 16


class Worker:
    """Such a process.

    Args:
        module: of thence, run as a program.
        folder: its working directory.
        log: what it prints is added to this file.
        threads: of torch.
        keep_open: file descriptors that it inherits.
        environment: laid over this process's.
    """

    def __init__(
        self,
        module: str,
        folder: Path,
        log: Path,
        threads: int,
        keep_open: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ):
        self.log, self.inbox = log, Inbox()
        log.parent.mkdir(exist_ok=True)
        own = {**KEEP_MEMORY, **os.environ, **(environment or {})}
        with log.open("ab") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                cwd=folder,
                env={**own, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"},
                pass_fds=tuple(keep_open),
                start_new_session=True,  # Ctrl-C reaches the comparison, which ends its workers
            )

    @property
    def output(self) -> IO[bytes]:
        """What a selector can watch."""
        assert self.process.stdout is not None
        return self.process.stdout

    def send(self, tables: Mapping[str, Any]) -> None:
        """Give it a job."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # where it has died, the end of its output says so
            self.process.stdin.write(pack(dict(tables)))
            self.process.stdin.flush()

    def messages(self) -> list[dict[str, Any]]:
        """The messages that have come; waits for a piece. The last is ``{"died": why}`` where the process has ended."""
        piece = os.read(self.output.fileno(), PIECE)
        if piece:
            return self.inbox.feed(piece)
        code = self.process.wait()
        tail = self.log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:].strip()
        return [{"died": f"its process ended with code {code}; the end of {self.log}:\n{redacted(tail)}"}]

    def stop(self) -> None:
        """End the process; a run in the middle can be taken up again."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

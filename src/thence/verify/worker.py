"""The process in which answers are checked: `python -m thence.verify.worker MEMORY_MB ALARM_SECONDS`.

Reads {"text", "answer"} from standard input, writes a grade for each to standard output, and ends with its input. It
guards itself too, so that it cannot outlive a parent that was killed: the kernel's alarm ends an answer that takes too
long, even in the middle of one long multiplication, and the address space is limited.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
from pathlib import Path
from typing import BinaryIO

from thence.framed import pack, read
from thence.verify.verdict import Verdict, to_plain, unknown

FULL = 0.9  # share of the address space at which a wrong verdict may be the work of a swallowed MemoryError
WORN = 0.5  # share at which a worker gives way to a fresh one, so that every answer finds room


def main(memory_mb: int, alarm: float) -> int:
    """Serve until standard input ends. Returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies = _own_stdout()
    try:
        _limit(memory_mb)
        # Even "disabled" timeouts warn on every start; the parser of math-verify logs every answer that it cannot read.
        logging.disable(logging.CRITICAL)
        from thence.verify.math import grade_math

        # Compiles the regular expressions outside any answer's time.
        if grade_math("so the answer is $\\boxed{1}$", "1").verdict is not Verdict.RIGHT:
            raise RuntimeError("math-verify does not take 1 for 1")
    except BaseException as error:
        replies.write(pack({"failed": f"{type(error).__name__}: {error}"}))
        return 1
    replies.write(pack({"ready": True}))

    while (request := read(sys.stdin.buffer)) is not None:
        signal.setitimer(signal.ITIMER_REAL, alarm)
        try:
            grade = grade_math(request["text"], request["answer"])
        except MemoryError:
            grade = unknown("memory")
        filled = _peak_mb() / memory_mb
        if filled > FULL and grade.verdict is not Verdict.RIGHT:
            grade = unknown("memory", grade.extracted)
        retire = filled > WORN or grade.reason == "memory"
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(pack({"grade": to_plain(grade), "retire": retire}))
        if retire:
            return 0
    return 0


def _own_stdout() -> BinaryIO:
    """Keep standard output for replies alone: what a parser prints must not get between them."""
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return replies


def _limit(memory_mb: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))


def _peak_mb() -> float:
    """Largest address space that this process ever had, in MB; 0 where the system does not tell (not Linux)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmPeak:")), 0.0)


if __name__ == "__main__":
    # os._exit: freeing what an answer left behind can take longer than the answer did.
    os._exit(main(int(sys.argv[1]), float(sys.argv[2])))

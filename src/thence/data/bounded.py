"""Running what a file from elsewhere says, a chat template above all, within limits of time and memory.

A template is a program: two loops in each other run for days, and one product fills the memory. The sandbox of
transformers keeps it from files and attributes, not from that.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class TookTooLong(BaseException):
    """The limit of time has passed. No `except Exception` on the way holds it up."""


@contextmanager
def bounded(seconds: float, memory: int) -> Iterator[None]:
    """Run the body within limits of seconds and of bytes that it may add; both are as before afterwards.

    The time is watched in the main thread, where signals arrive; the memory on Linux.

    Raises:
        TookTooLong: the time has passed.
        MemoryError: the memory was not enough.
    """
    with _limited_memory(memory):
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGALRM, _stop)
        left, every = signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            if left:  # somebody else's alarm still comes, a little late
                signal.setitimer(signal.ITIMER_REAL, left, every)


def _stop(number: int, frame: FrameType | None) -> None:
    raise TookTooLong


@contextmanager
def _limited_memory(more: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = _address_space()
    if now is None or (soft != resource.RLIM_INFINITY and soft <= now + more):
        yield
        return
    limit = now + more if hard == resource.RLIM_INFINITY else min(now + more, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int | None:
    """Bytes of address space in use; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return None

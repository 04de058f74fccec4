"""One writer per folder: a lock that the system releases when its process ends, in any way."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thence.errors import UserError

log = logging.getLogger(__name__)
LOCK = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems without locks


@contextmanager
def held(folder: Path, doing: str, *, wait: float = 0.0) -> Iterator[int]:
    """Hold a folder, so that no other process writes into it meanwhile. Yields the lock's file descriptor.

    The lock is the system's (flock): it ends with its process and with all that inherited the descriptor, so a killed
    process leaves none behind. The file beside it names the holder for the reader and decides nothing.

    Args:
        doing: what the holder does, as it stands after "another process", for example "runs this comparison".
        wait: seconds to wait for a holder that is just ending.

    Raises:
        UserError: another process holds it; its number, host and start are named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = _open(folder / LOCK)
    try:
        _take(handle, folder, doing, wait)
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(handle, 0)
        os.pwrite(handle, (json.dumps(facts) + "\n").encode(), 0)
        yield handle
    finally:
        os.close(handle)


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UserError(
            "a link stands where the lock of this folder is kept", remedy="move it elsewhere", file=file
        ) from None


def refuse_if_held(folder: Path, doing: str, *, wait: float = 0.0) -> None:
    """Raise the error of :func:`held` where another process holds the folder. Nothing is written or made."""
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        _take(handle, folder, doing, wait)
    finally:
        os.close(handle)


def is_held(folder: Path) -> bool | None:
    """Whether a process holds the folder; None where its file system has no locks. Nothing is written."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return None
    finally:
        os.close(handle)


def _take(handle: int, folder: Path, doing: str, wait: float) -> None:
    until = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= until:
                raise UserError(
                    f"another process {doing}{_holder(handle)}",
                    remedy="wait for it or stop it, or give another folder",
                    file=folder,
                ) from None
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            log.warning("%s lies on a file system without locks: start no second process that writes there", folder)
            return


def _holder(handle: int) -> str:
    try:
        facts = json.loads(os.pread(handle, 4096, 0))
        return f": process {facts['pid']} on {facts['host']}, since {facts['since']}"
    except (ValueError, KeyError, TypeError, OSError):
        return ""

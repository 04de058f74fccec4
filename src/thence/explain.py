"""The one place that turns an exception from anywhere into what is wrong, where, and what to do about it.

Nothing here imports torch, transformers or pyarrow: their exceptions are told by the names of their classes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sysconfig
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from thence.errors import UserError, first_line
from thence.foreign_text import clean
from thence.redaction import redacted

TRACEBACK = "THENCE_TRACEBACK"
AGAIN = "then run the same command again: it resumes, and what was written before is whole"

_OF_SYSTEM: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", f"free some space, or use a folder on another disk; {AGAIN}"),
    errno.EDQUOT: ("your quota on this disk is used up", f"free some space, or use another folder; {AGAIN}"),
    errno.EFBIG: ("the file may not become so large", f"raise the limit on the size of files (ulimit -f), {AGAIN}"),
    errno.EROFS: ("the file system is read-only", "use a folder that can be written to"),
    errno.EACCES: ("permission denied", "change the permissions of the file or its folder, or use another folder"),
    errno.EPERM: ("not permitted", "change the permissions of the file or its folder, or use another folder"),
    errno.ENAMETOOLONG: ("the name is too long for this file system", "use a shorter name or folder"),
    errno.EMFILE: ("this process has too many open files", f"raise the limit (ulimit -n 4096), {AGAIN}"),
    errno.ENFILE: ("the system has too many open files", f"close other programs, {AGAIN}"),
    errno.ENOENT: ("no such file or folder", "check the path; if another program removed it, put it back"),
    errno.EIO: ("the disk or network drive failed to read or write", f"check the drive (dmesg says more), {AGAIN}"),
    errno.EISDIR: ("a folder, where a file was expected", "give the path of a file"),
    errno.ENOTDIR: ("a file, where a folder was expected", "give the path of a folder, or another --folder"),
    errno.EEXIST: ("it is there already", "give another name or folder"),
    errno.ENOTEMPTY: ("the folder is not empty", "make sure that nothing else writes into it, and run again"),
    errno.ELOOP: ("its links point to each other in a circle", "replace the link by what it should point to"),
    errno.ESTALE: ("the network drive has lost the file", f"mount it again, {AGAIN}"),
    errno.ENOMEM: ("out of memory", f"close other programs or use a machine with more memory, {AGAIN}"),
    errno.EAGAIN: ("the system has no room for another process", f"raise the limit (ulimit -u), {AGAIN}"),
    errno.EBUSY: ("something else is using it", f"wait for the other program, {AGAIN}"),
    errno.EINVAL: ("the file system does not take this name or request", "use another name or folder"),
    errno.EADDRINUSE: ("the port is in use", "give another port, or end what uses it"),
    errno.ECONNREFUSED: ("nobody answers at this address", "start the server, or correct the address"),
}
_OF_MACHINE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EMFILE,
    errno.ENFILE,
    errno.EIO,
    errno.ENOMEM,
    errno.EFBIG,
)
_OUT_OF_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory", "not enough memory")
_LESS_MEMORY = (
    "make the micro-batches smaller (--sft.micro-batch-tokens, --rl.micro-batch-tokens), sample fewer rows at a time "
    "(--rl.rollout-rows, --eval.rollout-rows; --rows of thence eval), set activation_checkpointing, "
    f"or use a smaller model or a machine with more memory; {AGAIN}"
)
LOST_EACH_OTHER = "the processes of this run lost each other"
"""How the error of a rank begins that failed since another one had."""
_OF_RANKS = frozenset(("DistBackendError", "DistNetworkError", "DistStoreError", "DistError"))
_LOST_RANKS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
_OF_HUB = ("huggingface_hub", "requests", "httpx", "urllib3", "httpcore")
_OF_FILES = frozenset(
    ("SafetensorError", "ArrowInvalid", "ArrowException", "ArrowSerializationError", "BadZipFile", "BadGzipFile")
)
_NAMES_OF_FILES = ("temporary", "kept", "path", "file", "final", "folder", "name")


def explained(error: BaseException) -> UserError | None:
    """What an exception means for the user; None where it can only be a fault of thence itself."""
    if isinstance(error, UserError):
        return error
    explain: tuple[Callable[[BaseException], UserError | None], ...] = (
        _memory,
        _hub,
        _ranks,
        _system,
        _text,
        _damaged,
        _package,
    )
    for attempt in explain:
        if (said := attempt(error)) is not None:
            return said
    return None


def is_of_system(error: BaseException) -> bool:
    """Whether memory or disk ran out, or the system refused: no fault of what was being opened."""
    return _memory(error) is not None or _number(error) in _OF_MACHINE


def told(error: BaseException) -> str:
    """An exception in one text to keep or print: explained where it can be, else by its class; without secrets."""
    said = explained(error)
    return str(said) if said is not None else redacted(f"{type(error).__name__}: {error}")


def of_thence(error: BaseException, traceback_file: Path | None) -> str:
    """What to print of an exception that nobody foresaw."""
    place = _innermost(error.__traceback__)
    kept = f"; the traceback is in {traceback_file}" if traceback_file is not None else ""
    return (
        f"{type(error).__name__}: {first_line(error)}{f' ({place})' if place else ''}\n"
        f"  this is a fault of thence, not of yours; what was written before is kept{kept}\n"
        f"  remedy: report it with the traceback ({TRACEBACK}=1 prints it); the same command resumes where it was"
    )


def traceback_text(error: BaseException) -> str:
    """The traceback without secrets and without what a terminal would obey."""
    return clean(redacted("".join(traceback.format_exception(error))))


def keep_traceback(error: BaseException) -> Path | None:
    """Write the traceback to a new temporary file that only the user can read; None if it cannot."""
    with contextlib.suppress(OSError):
        handle, name = tempfile.mkstemp(prefix="thence-traceback-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(traceback_text(error))
        return Path(name)
    return None


def foreign_exit(error: SystemExit) -> UserError:
    """`sys.exit` called by code that is not thence's: a model's, a reward function's, a library's."""
    place = _innermost(error.__traceback__) or "code that is not thence's"
    code = "" if error.code is None else repr(error.code) if isinstance(error.code, str) else error.code
    return UserError(
        f"{place} called sys.exit({code}) before the work was done",
        remedy=f"take it out of that code, {AGAIN}",
    )


def _memory(error: BaseException) -> UserError | None:
    text = str(error).lower()
    named = isinstance(error, MemoryError) or type(error).__name__ in ("OutOfMemoryError", "ArrowMemoryError")
    if not named and not (isinstance(error, RuntimeError) and any(said in text for said in _OUT_OF_MEMORY)):
        return None
    where = "the GPU is" if "cuda" in text or "hip" in text else "this process is"
    return UserError(f"{where} out of memory{_said(error)}", remedy=_LESS_MEMORY)


def _hub(error: BaseException) -> UserError | None:
    if not any(kind.__module__.startswith(_OF_HUB) for kind in type(error).__mro__):
        return None
    return UserError(
        f"the hub or server did not give what was asked for: {first_line(error)}",
        remedy="check the name, the network and your access (hf auth login), or give a local folder",
    )


def _ranks(error: BaseException) -> UserError | None:
    lost = isinstance(error, RuntimeError) and any(said in str(error) for said in _LOST_RANKS)
    if type(error).__name__ not in _OF_RANKS and not lost:
        return None
    return UserError(
        f"{LOST_EACH_OTHER}: {first_line(error)}",
        remedy=f"look for the first error of the other processes, {AGAIN}",
    )


def _system(error: BaseException) -> UserError | None:
    number = _number(error)
    if number is None and not isinstance(error, OSError):
        return None
    problem, remedy = _OF_SYSTEM.get(number or 0, (None, None))
    if problem is None and isinstance(error, (ConnectionError, TimeoutError)):
        problem, remedy = f"a connection broke off{_said(error)}", f"see that the other side runs, {AGAIN}"
    if problem is None or remedy is None:
        problem, remedy = first_line(error), f"see to what it says, {AGAIN}"
    named = _named(getattr(error, "filename", None))
    if number == errno.EEXIST and named is not None and not Path(named).is_dir():
        problem, remedy = _OF_SYSTEM[errno.ENOTDIR]
    return UserError(problem, remedy=remedy, file=named or _file_of(error))


def _number(error: BaseException) -> int | None:
    """The system's number of an error. Libraries in Rust and C++ tell it in their text alone."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    if found := re.search(r"\(os error (\d+)\)", text):
        return int(found[1])
    return next((number for number in _OF_MACHINE if os.strerror(number) in text), None)


def _text(error: BaseException) -> UserError | None:
    if isinstance(error, UnicodeDecodeError):
        line = error.object[: error.start].count(b"\n") + 1
        problem = f"not {error.encoding.upper()} text: byte 0x{error.object[error.start]:02x} at {error.start}"
        remedy = "save the file as UTF-8 (iconv -f latin1 -t utf-8 OLD > NEW), or give another"
        return UserError(problem, remedy=remedy, file=_file_of(error), line=line)
    if isinstance(error, UnicodeEncodeError):
        problem = f"a character cannot be written as {error.encoding}: {error.object[error.start]!r}"
        return UserError(problem, remedy="take it out of the name or text that was given", file=_file_of(error))
    if "surrogates not allowed" in str(error):  # how Python holds the bytes of a name that is not UTF-8
        problem = f"a name or text that was given is not UTF-8: {first_line(error)}"
        return UserError(problem, remedy="rename the file, or write the text in UTF-8")
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return UserError("a name holds a NUL character", remedy="take it out of the name", file=_file_of(error))
    if isinstance(error, RecursionError):
        remedy = "look for brackets within brackets within brackets in what was read"
        return UserError("something is nested too deeply to be read", remedy=remedy, file=_file_of(error))
    return None


def _damaged(error: BaseException) -> UserError | None:
    """What a file holds that could not be read. Errors that the user's own code raises say nothing about a file."""
    if (reader := _raiser(error)) is not None and not _is_of_thence(reader):
        return None
    remedy = f"put back a whole copy of the file, or move it away, {AGAIN}"
    if isinstance(error, json.JSONDecodeError):
        return UserError(f"not valid JSON: {error.msg}", remedy=remedy, file=_file_of(error), line=error.lineno)
    if type(error).__name__ == "TOMLDecodeError":
        return UserError(f"not valid TOML: {first_line(error)}", remedy=remedy, file=_file_of(error))
    if type(error).__name__ in _OF_FILES:
        return UserError(f"a damaged file: {first_line(error)}", remedy=remedy, file=_file_of(error))
    file = None if reader is None else _file_in(reader)  # these errors may come from a pipe or from values in memory
    if file is None or not Path(file).is_file():
        return None
    if isinstance(error, EOFError):
        return UserError(f"a damaged file: {first_line(error)}", remedy=remedy, file=file)
    if type(error).__name__ == "ValidationError" and type(error).__module__.startswith("pydantic"):
        problem = f"values that do not fit: {'; '.join(line.strip() for line in str(error).splitlines()[1:3])}"
        return UserError(problem, remedy=remedy, file=file)
    return None


def _package(error: BaseException) -> UserError | None:
    if not isinstance(error, ImportError) or (error.name or "").split(".")[0] == "thence":
        return None
    what = error.name or "a package"
    return UserError(
        f"{what} cannot be imported: {first_line(error)}",
        remedy=f"install {what.split('.')[0]} into this environment; `thence doctor` lists what is there",
    )


def _said(error: BaseException) -> str:
    text = str(error).strip()
    return f": {first_line(error)}" if text else ""


def _named(name: object) -> str | None:
    if isinstance(name, bytes):
        return os.fsdecode(name)
    return name if isinstance(name, str) else None


def _frames(trace: TracebackType | None) -> Iterator[TracebackType]:
    while trace is not None:
        yield trace
        trace = trace.tb_next


def _is_of_thence(trace: TracebackType) -> bool:
    return str(trace.tb_frame.f_globals.get("__name__", "")).split(".")[0] == "thence"


def _raiser(error: BaseException) -> TracebackType | None:
    """The innermost place that is not in a library: in thence, or in the user's own code."""
    libraries = tuple(sysconfig.get_paths()[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib"))
    for trace in reversed(list(_frames(error.__traceback__))):
        if _is_of_thence(trace) or not trace.tb_frame.f_code.co_filename.startswith(("<", *libraries)):
            return trace
    return None


def _file_of(error: BaseException) -> str | None:
    """The file that thence was working on: a write that fails does not say which one it was for."""
    places = reversed(list(_frames(error.__traceback__)))
    return next((file for trace in places if _is_of_thence(trace) and (file := _file_in(trace)) is not None), None)


def _file_in(trace: TracebackType) -> str | None:
    """The file that a place in thence works on."""
    seen = trace.tb_frame.f_locals
    for name in _NAMES_OF_FILES:
        value = seen.get(name)
        if isinstance(value, Path):
            return str(value)
        if isinstance(getattr(value, "name", None), str) and hasattr(value, "write"):
            return value.name  # type: ignore[union-attr]
    return None


def _innermost(trace: TracebackType | None) -> str:
    found = [(t.tb_frame.f_code.co_filename, t.tb_lineno) for t in _frames(trace)]
    return f"{found[-1][0]}:{found[-1][1]}" if found else ""

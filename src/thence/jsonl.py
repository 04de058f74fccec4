"""JSON Lines that thence writes: one object a line. A damaged line costs itself alone, and nobody overwrites it.

A last line that a killed process left unfinished is torn, not damaged: what it held is written again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from thence.errors import first_line
from thence.files import flush, to_json, write_atomically, write_bytes_atomically
from thence.wording import json_kind

log = logging.getLogger(__name__)


def write_jsonl(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write plain values, one a line, atomically."""
    write_atomically(path, "".join(to_json(line) + "\n" for line in lines))


def append_jsonl(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Add plain values, one a line. They are not flushed to disk: a crash can lose them or tear the last."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(to_json(line) + "\n" for line in lines)


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be read: its number, counted from 1, its bytes, and why."""

    number: int
    raw: bytes
    why: str


NumberedObject = tuple[int, dict[str, Any]]
Check = Callable[[dict[str, Any]], str | None]
"""Says what is wrong with an object that a line holds; None: nothing."""


@dataclass(frozen=True)
class Lines:
    """The lines of a JSON Lines file.

    Args:
        rows: what could be read, with the number of its line.
        bad: what could not.
        torn: a last line that a killed process left unfinished; b"" where there is none.
    """

    rows: tuple[NumberedObject, ...]
    bad: tuple[BadLine, ...]
    torn: bytes

    @property
    def values(self) -> list[dict[str, Any]]:
        """The readable lines."""
        return [row for _, row in self.rows]


def read_lines(path: Path, check: Check | None = None) -> Lines:
    """Read a JSON Lines file that thence wrote: a damaged line costs itself alone. No file is an empty one.

    Args:
        check: what is wrong with an object that a line holds; such a line is bad too.
    """
    rows: list[NumberedObject] = []
    bad: list[BadLine] = []
    torn = b""
    for line in stream_lines(path, check):
        if isinstance(line, bytes):
            torn = line
        elif isinstance(line, BadLine):
            bad.append(line)
        else:
            rows.append(line)
    return Lines(tuple(rows), tuple(bad), torn)


def stream_lines(path: Path, check: Check | None = None) -> Iterator[NumberedObject | BadLine | bytes]:
    """The lines of a file one by one, for large ones: rows and bad lines, and last the bytes of a torn line."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield _line(number, raw, check)


def _line(number: int, raw: bytes, check: Check | None) -> NumberedObject | BadLine | bytes:
    ended, raw = raw.endswith(b"\n"), raw.rstrip(b"\r\n")
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return BadLine(number, raw, "not UTF-8 text")
    except (ValueError, RecursionError) as error:
        # the beginning of an object is what a killed process leaves; anything else, such as zeros, is damage
        if not ended and raw.startswith(b"{") and not first_line(error).startswith("Extra data"):
            return raw
        return BadLine(number, raw, f"not valid JSON: {first_line(error)}")
    if not isinstance(value, dict):
        return BadLine(number, raw, f"holds {json_kind(value)}, not an object")
    why = None if check is None else check(value)
    return (number, value) if why is None else BadLine(number, raw, why)


def say_bad_lines(path: Path, bad: Sequence[BadLine], what_follows: str) -> None:
    """Name damaged lines in the log, each once in a process.

    Args:
        what_follows: what becomes of them, for example "it is left out".
    """
    for line in bad:
        _say(path, line, what_follows)


@lru_cache(maxsize=4096)
def _say(path: Path, line: BadLine, what_follows: str) -> None:
    log.warning("%s:%d: a damaged line (%s): %s", path, line.number, line.why, what_follows)


def set_aside(path: Path, bad: Sequence[BadLine]) -> None:
    """Append damaged lines to ``NAME.damaged`` beside their file, flushed to disk, and name them in the log.

    The caller then writes the file without them. A process killed in between sets them aside twice, never not at all.
    """
    if not bad:
        return
    aside = damaged_lines(path)
    say_bad_lines(path, bad, f"it is set aside in {aside.name}, the other lines are kept")
    with aside.open("ab") as file:
        file.write(b"".join(line.raw + b"\n" for line in bad))
    flush(aside)


def damaged_lines(path: Path) -> Path:
    """Where the damaged lines of a file are set aside."""
    return path.with_name(f"{path.name}.damaged")


def repair_lines(path: Path, check: Check | None = None) -> None:
    """Set damaged lines aside and drop a torn one, so that lines can be appended. A whole file is left as it is."""
    content = path.read_bytes() if path.is_file() else b""
    found = read_lines(path, check)
    set_aside(path, found.bad)
    gone = {line.number for line in found.bad} | ({content.count(b"\n") + 1} if found.torn else set())
    kept = [raw for number, raw in enumerate(content.split(b"\n"), start=1) if number not in gone and raw.strip()]
    whole = b"".join(raw + b"\n" for raw in kept)
    if whole != content:
        write_bytes_atomically(path, whole)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The readable lines of a file; damaged ones are named in the log and left out."""
    found = read_lines(path)
    say_bad_lines(path, found.bad, "it is left out")
    return found.values

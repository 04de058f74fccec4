"""Files that a crash leaves whole, damaged ones that nobody overwrites, and numbers as other programs read them.

JSON here never holds NaN or infinity, which are not JSON: they become null. A file of thence that cannot be read is
reported with its name and line, and is kept beside whatever takes its place.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from thence.errors import DamagedFile, first_line
from thence.wording import json_kind

log = logging.getLogger(__name__)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old text or the new one. Lone surrogates become `?`."""
    write_bytes_atomically(path, text.encode("utf-8", "replace"))


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old bytes or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):  # on a full disk its space is needed
            temporary.unlink()
        raise


def to_json(value: Any, indent: int | None = None) -> str:
    """A plain value as JSON; NaN and infinity become null."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def write_over(path: Path, text: str) -> None:
    """Write a file made from others, atomically. An earlier one that cannot be read any more is kept beside it."""
    if path.is_file():
        try:
            _parsed(path, "put a whole copy back")
        except DamagedFile as error:
            log.warning("%s; it is kept as %s", first_line(error), keep_damaged(path).name)
    write_atomically(path, text)


def read_json(path: Path, kind: type = dict, *, remedy: str, shape: Callable[[Any], object] | None = None) -> Any:
    """A JSON file that thence wrote.

    Args:
        kind: type of the value at its top.
        remedy: what to do where it is damaged.
        shape: looks at the value; raises KeyError, TypeError, ValueError or AttributeError, or returns False, where it
            is not what thence writes.

    Raises:
        FileNotFoundError: it is not there.
        DamagedFile: it is there and cannot be read, or holds something else.
    """
    value = _parsed(path, remedy, ".json")
    if not isinstance(value, kind):
        raise DamagedFile(f"holds {json_kind(value)}, not {json_kind(kind())}", remedy=remedy, file=path)
    return fitted(path, value, shape, remedy)


def is_environment(facts: Mapping[str, Any]) -> bool:
    """Whether a value is what a run or an evaluation keeps in ``environment.json``."""
    return bool(facts) and isinstance(facts.get("later_starts", []), list)


def read_toml(path: Path, *, remedy: str) -> dict[str, Any]:
    """A TOML file that thence wrote. Raises FileNotFoundError, or DamagedFile where it cannot be read."""
    return _parsed(path, remedy, ".toml")


def fitted(path: Path, value: Any, shape: Callable[[Any], object] | None, remedy: str) -> Any:
    """The value of a file, once it was found to be what thence writes; see :func:`read_json`. Raises DamagedFile."""
    try:
        if shape is None or shape(value) is not False:
            return value
        why = "a value has another type"
    except KeyError as error:
        why = f"it lacks {error}"
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        why = first_line(error)
    raise DamagedFile(f"not what thence wrote: {why}", remedy=remedy, file=path)


def _parsed(path: Path, remedy: str, suffix: str = "") -> Any:
    """The value of a JSON or TOML file, by its suffix; other files are text."""
    try:
        text = path.read_bytes().decode("utf-8")
        if (suffix or path.suffix) == ".toml":
            return tomllib.loads(text)
        return json.loads(text) if (suffix or path.suffix) == ".json" else text
    except IsADirectoryError:
        raise DamagedFile("is a folder, not a file", remedy=remedy, file=path) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DamagedFile("not UTF-8 text", remedy=remedy, file=path, line=line) from None
    except json.JSONDecodeError as error:
        raise DamagedFile(f"not valid JSON: {error.msg}", remedy=remedy, file=path, line=error.lineno) from None
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"at line (\d+)", str(error))
        line = int(place[1]) if place else None
        raise DamagedFile(f"not valid TOML: {first_line(error)}", remedy=remedy, file=path, line=line) from None
    except (ValueError, RecursionError) as error:  # numbers of 5,000 digits, 10,000 brackets
        raise DamagedFile(f"cannot be read: {first_line(error)}", remedy=remedy, file=path) from None


def keep_damaged(path: Path, word: str = "damaged") -> Path:
    """Copy a damaged file to ``NAME.damaged-1`` (or the next free number) beside it, flushed to disk.

    Args:
        word: in place of "damaged", for a file that is whole and about to be replaced.
    """
    number = 1
    while (kept := path.with_name(f"{path.name}.{word}-{number}")).exists():
        number += 1
    with kept.open("xb") as copy:
        copy.write(path.read_bytes())
        copy.flush()
        os.fsync(copy.fileno())
    return kept


def write_jsonl(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write plain values, one a line, atomically."""
    write_atomically(path, "".join(to_json(line) + "\n" for line in lines))


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be read: its number, counted from 1, its bytes, and why."""

    number: int
    raw: bytes
    why: str


Row = tuple[int, dict[str, Any]]
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

    rows: tuple[Row, ...]
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
    rows: list[Row] = []
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


def stream_lines(path: Path, check: Check | None = None) -> Iterator[Row | BadLine | bytes]:
    """The lines of a file one by one, for large ones: rows and bad lines, and last the bytes of a torn line."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield _line(number, raw, check)


def _line(number: int, raw: bytes, check: Check | None) -> Row | BadLine | bytes:
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
        file.flush()
        os.fsync(file.fileno())


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


def finite(value: Any) -> Any:
    """The same plain value with null for NaN and infinity, which are not JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def to_csv(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A table as CSV; text that a spreadsheet would take for a formula is quoted."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _no_formula(value) for key, value in row.items()} for row in rows)
    return buffer.getvalue()


def _no_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value

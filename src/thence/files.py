"""Files that a crash leaves whole, damaged ones that nobody overwrites, and numbers as other programs read them.

JSON here never holds NaN or infinity, which are not JSON: they become null. A file of thence that cannot be read is
reported with its name and line, and is kept beside whatever takes its place.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thence.errors import DamagedFile


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old text or the new one. Lone surrogates become `?`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("w", encoding="utf-8", errors="replace") as file:
            file.write(text)
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


def read_json(path: Path, kind: type = dict, *, remedy: str) -> Any:
    """A JSON file that thence wrote.

    Args:
        kind: type of the value at its top.
        remedy: what to do where it is damaged.

    Raises:
        FileNotFoundError: it is not there.
        DamagedFile: it is there and cannot be read.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DamagedFile("not UTF-8 text", remedy=remedy, file=path, line=line) from None
    except json.JSONDecodeError as error:
        raise DamagedFile(f"not valid JSON: {error.msg}", remedy=remedy, file=path, line=error.lineno) from None
    except (ValueError, RecursionError) as error:  # numbers of 5,000 digits, 10,000 brackets
        raise DamagedFile(f"not valid JSON: {error}", remedy=remedy, file=path) from None
    if not isinstance(value, kind):
        raise DamagedFile(f"holds {type(value).__name__}, not {kind.__name__}", remedy=remedy, file=path)
    return value


def keep_damaged(path: Path) -> Path:
    """Copy a damaged file to ``NAME.damaged-1`` (or the next free number) beside it, flushed to disk."""
    number = 1
    while (kept := path.with_name(f"{path.name}.damaged-{number}")).exists():
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


@dataclass(frozen=True)
class Lines:
    """The lines of a JSON Lines file.

    Args:
        rows: what could be read, with the number of its line.
        bad: what could not.
        torn: a last line without an end, which a killed process leaves; b"" where there is none.
    """

    rows: tuple[tuple[int, dict[str, Any]], ...]
    bad: tuple[BadLine, ...]
    torn: bytes

    @property
    def values(self) -> list[dict[str, Any]]:
        """The readable lines."""
        return [row for _, row in self.rows]


def read_lines(path: Path) -> Lines:
    """Read a JSON Lines file that thence wrote: a damaged line costs itself alone. No file is an empty one."""
    content = path.read_bytes() if path.is_file() else b""
    *whole, torn = content.split(b"\n")
    rows: list[tuple[int, dict[str, Any]]] = []
    bad: list[BadLine] = []
    for number, raw in enumerate(whole, start=1):
        try:
            value = json.loads(raw.decode("utf-8"))
            if isinstance(value, dict):
                rows.append((number, value))
            else:
                bad.append(BadLine(number, raw, f"holds {type(value).__name__}, not an object"))
        except UnicodeDecodeError:
            bad.append(BadLine(number, raw, "not UTF-8 text"))
        except (ValueError, RecursionError) as error:
            bad.append(BadLine(number, raw, f"not valid JSON: {error}"))
    return Lines(tuple(rows), tuple(bad), torn)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The readable lines of a file that may have damaged ones; :func:`read_lines` says which."""
    return read_lines(path).values


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

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from thence.errors import DamagedFile, first_line
from thence.toml import NotTomlError, parse_toml
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


def flush(path: Path) -> None:
    """Have the bytes of a file, or the names in a folder, written to disk before this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


def read_json(path: Path, *, remedy: str, shape: Callable[[Any], object] | None = None) -> Any:
    """A JSON file that thence wrote.

    Args:
        remedy: what to do where it is damaged.
        shape: looks at the value; raises KeyError, TypeError, ValueError or AttributeError, or returns False, where it
            is not what thence writes.

    Raises:
        FileNotFoundError: it is not there.
        DamagedFile: it is there and cannot be read, or holds something else.
    """
    value = _parsed(path, remedy, ".json")
    if not isinstance(value, dict):
        raise DamagedFile(f"holds {json_kind(value)}, not an object", remedy=remedy, file=path)
    return fitted(path, value, shape, remedy)


def is_environment(facts: Mapping[str, Any]) -> bool:
    """Whether a value is what a run or an evaluation keeps in ``environment.json``."""
    return bool(facts) and isinstance(facts.get("later_starts", []), list)


def read_own_toml(path: Path, *, remedy: str) -> dict[str, Any]:
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
            return parse_toml(text)
        return json.loads(text) if (suffix or path.suffix) == ".json" else text
    except IsADirectoryError:
        raise DamagedFile("is a folder, not a file", remedy=remedy, file=path) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DamagedFile("not UTF-8 text", remedy=remedy, file=path, line=line) from None
    except json.JSONDecodeError as error:
        raise DamagedFile(f"not valid JSON: {error.msg}", remedy=remedy, file=path, line=error.lineno) from None
    except NotTomlError as error:
        raise DamagedFile(first_line(error), remedy=remedy, file=path, line=error.line) from None
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
    flush(kept)
    return kept


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

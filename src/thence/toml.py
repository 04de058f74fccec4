"""TOML files that a user gives, with the lines of their fields; and writing, which the standard library does not."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thence.errors import RecipeError
from thence.given_files import read_given

MOST_BYTES = 4 * 2**20
DEEPEST = 64
"""Tables in tables; a name with more parts is refused before the parser, whose time grows with their square."""
_LONG_NAME = re.compile(r"(?<![\w-])(?:[\w-]++\s*+\.\s*+){64}")
_HEADER = re.compile(r"\s*\[{1,2}([^\[\]]+)\]{1,2}\s*(?:#.*)?")
_ENTRY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=(.*)""", re.DOTALL)
_PART = re.compile(r"""[\w-]+|"[^"]*"|'[^']*'""")


@dataclass(frozen=True)
class TomlFile:
    """A TOML file as it was read.

    Args:
        path: where it lies.
        tables: what it holds.
        text: as it stands there.
    """

    path: Path
    tables: dict[str, Any] = field(repr=False)
    text: str = field(repr=False)

    def line_of(self, *dotted: str) -> int | None:
        """The line, counted from 1, that sets a field; None: not found.

        Args:
            dotted: names that the field may stand under, the likeliest first. Where none is set, the line of the
                nearest table above the first.
        """
        places = _places(self.text)
        for name in dotted:
            if (path := tuple(name.split("."))) in places:
                return places[path]
        above = tuple(dotted[0].split("."))[:-1]
        while above and above not in places:
            above = above[:-1]
        return places.get(above)


def read_toml(path: Path, what: str, *, field: str | None = None) -> TomlFile:
    """Read a TOML file that a user names; a byte order mark at its start does no harm.

    Args:
        what: what the file is, for errors: "a recipe".
        field: the flag that names it.

    Raises:
        FileNotFoundError: nothing is there.
        RecipeError: no regular file, too large, not UTF-8, not TOML, or nested too deep.
    """
    text = read_given(path, what, most=MOST_BYTES, field=field)
    if long := _LONG_NAME.search(text):
        line = text[: long.start()].count("\n") + 1
        raise RecipeError(f"a name of more than {DEEPEST} parts", remedy="nest less", file=path, line=line)
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"line (\d+)", str(error))
        line = int(at.group(1)) if at else None
        raise RecipeError(f"not valid TOML: {error}", remedy="correct this line", file=path, line=line) from None
    except RecursionError:
        raise RecipeError("nested too deep", remedy=f"nest at most {DEEPEST} lists or tables", file=path) from None
    except ValueError as error:  # a number of 5,000 digits
        raise RecipeError(f"not valid TOML: {error}", remedy="write a shorter number", file=path) from None
    return TomlFile(path, tables, text)


def _places(text: str) -> dict[tuple[str, ...], int]:
    """Dotted names to the lines that set them or open their tables. Texts over several lines are stepped over."""
    places: dict[tuple[str, ...], int] = {}
    counts: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    open_quote = ""
    for number, line in enumerate(text.split("\n"), start=1):
        if open_quote:
            open_quote = "" if open_quote in line else open_quote
            continue
        if header := _HEADER.fullmatch(line):
            table = _parts(header[1])
            if line.lstrip().startswith("[["):
                counts[table] = counts.get(table, -1) + 1
                table = (*table, str(counts[table]))
            places.setdefault(table, number)
        elif entry := _ENTRY.match(line):
            name, value = (*table, *_parts(entry[1])), entry[2].strip()
            places.setdefault(name, number)
            if value.startswith("{") and len(value) < 10_000:
                for inner in re.finditer(r"""((?<![\w-])[\w-]+|"[^"]*")\s*=""", value):
                    places.setdefault((*name, *_parts(inner[1])), number)
            open_quote = next((q for q in ('"""', "'''") if value.startswith(q) and q not in value[3:]), "")
    return places


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in _PART.findall(name))


def to_toml(tables: Mapping[str, Any]) -> str:
    """Nested plain values as TOML text that :func:`load_recipe` reads back. None is left out."""
    lines: list[str] = []
    _write_table(tables, [], lines)
    return "\n".join(lines).lstrip("\n") + "\n"


def _write_table(table: Mapping[str, Any], path: list[str], lines: list[str]) -> None:
    plain = {key: value for key, value in table.items() if not isinstance(value, Mapping) and value is not None}
    if path and (plain or not table):
        lines += ["", f"[{'.'.join(_key(part) for part in path)}]"]
    lines += [f"{_key(key)} = {_literal(value)}" for key, value in plain.items()]
    for key, value in table.items():
        if isinstance(value, Mapping):
            _write_table(value, [*path, key], lines)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _literal(key)


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        escaped = re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\u{ord(m.group()):04x}", escaped)
        return f'"{escaped}"'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_literal(inner) for inner in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_literal(v)}" for k, v in value.items()) + "}"
    return repr(value)

"""TOML files that a user gives, with the lines of their fields."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thence.errors import RecipeError
from thence.given_files import read_given
from thence.toml import NotTomlError, parse_toml

MOST_BYTES = 4 * 2**20
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
    try:
        return TomlFile(path, parse_toml(text), text)
    except NotTomlError as error:
        raise RecipeError(str(error), remedy=error.remedy, file=path, line=error.line) from None


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

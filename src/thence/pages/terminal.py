"""Tables in a terminal, narrow ones too."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table as Drawn
from rich.text import Text

from thence.foreign_text import visible
from thence.pages.table import Cell, Table, TableRow

_GAP = 2
_MOST_LABEL = 34
_UNBROKEN = 8
_GLUE = "\0"
"""Stands for a space; no text for a page holds it."""


class TableView:
    """A table for ``Console.print``: columns that do not fit go below, with the labels again. Notes are left out."""

    def __init__(self, table: Table):
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table, width = self.table, options.max_width
        labels = min(
            _MOST_LABEL,
            max(width // 3, 10),
            max([len(row.label) for row in table.rows] + [_narrowest(table.headers[0])]),
        )
        widths = [
            max([_narrowest(header), *(_needs(row.cells[index]) for row in table.rows)])
            for index, header in enumerate(table.headers[1:])
        ]
        parts: list[list[int]] = [[]]
        for index, needed in enumerate(widths):
            used = labels + sum(_GAP + widths[held] for held in parts[-1])
            if parts[-1] and used + _GAP + needed > width:
                parts.append([])
            parts[-1].append(index)
        for columns in parts:
            if title := visible(table.title) + ("" if columns is parts[0] else " (further columns)"):
                yield Text(title, style="table.title")
            left_over = width - labels - sum(_GAP + widths[index] for index in columns)
            for index in columns:
                if index in table.words:  # words take the room that is there
                    longest = max(len(row.cells[index].text) for row in table.rows)
                    wider = max(0, min(left_over, longest - widths[index]))
                    widths[index], left_over = widths[index] + wider, left_over - wider
            yield _drawn(table, columns, [labels, *(widths[i] for i in columns)])


def with_notes(table: Table) -> Group:
    """A table and, below it, how to read it."""
    return Group(TableView(table), *(Text(visible(note), style="dim") for note in table.notes))


def _drawn(table: Table, columns: Sequence[int], widths: Sequence[int]) -> Drawn:
    look = {"box": SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": (0, _GAP - 1, 0, 0)}
    drawn = Drawn(**look)
    drawn.add_column(_head(table.headers[0], widths[0]), width=widths[0], overflow="fold")
    for index, width in zip(columns, widths[1:], strict=True):
        side = "left" if index in table.words else "right"
        drawn.add_column(_head(table.headers[index + 1], width), justify=side, overflow="fold", width=width)
    group = ""
    for row in table.rows:
        if row.apart:
            drawn.add_section()
        if row.group and row.group != group:
            group = row.group
            drawn.add_row(Text(visible(group), style="dim italic"))
        drawn.add_row(*_texts(row, columns))
    return drawn


def _head(header: str, width: int) -> Text:
    return Text("\n".join(textwrap.wrap(_glued(header), width)).replace(_GLUE, " "))


def _glued(header: str) -> str:
    """A header that cannot be broken at an equals sign."""
    return visible(header).replace(" = ", f"{_GLUE}={_GLUE}")


def _texts(row: TableRow, columns: Sequence[int]) -> list[Text]:
    cells = [row.cells[index] for index in columns]
    return [Text(visible(row.label)), *(Text(_lines(cell), style="bold" if cell.strong else "") for cell in cells)]


def _lines(cell: Cell) -> str:
    return visible(f"{cell.text}\n{cell.sub}" if cell.sub else cell.text)


def _needs(cell: Cell) -> int:
    """Characters of the widest line; long words of settings may be broken."""
    return min(30, max(map(len, _lines(cell).split("\n"))))


def _narrowest(header: str) -> int:
    """Characters that a header needs: short ones stay on a line."""
    return (
        len(header) if 0 < len(header) <= _UNBROKEN else max([len(word) for word in _glued(header).split(" ")] or [1])
    )

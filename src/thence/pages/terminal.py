"""Tables in a terminal, narrow ones too."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table as Drawn
from rich.text import Text

from thence.foreign_text import visible
from thence.pages.table import Cell, Row, Table

_GAP = 2
_MOST_LABEL = 34
_UNBROKEN = 8


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
            yield _drawn(table, columns, [labels, *(widths[i] for i in columns)], columns is parts[0])


def with_notes(table: Table) -> Group:
    """A table and, below it, how to read it."""
    return Group(TableView(table), *(Text(visible(note), style="dim") for note in table.notes))


def _drawn(table: Table, columns: Sequence[int], widths: Sequence[int], first: bool) -> Drawn:
    title = Text(visible(table.title) + ("" if first else " (further columns)"))
    look = {"box": SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": (0, _GAP - 1, 0, 0)}
    drawn = Drawn(title=title, title_justify="left", **look)
    drawn.add_column(Text(visible(table.headers[0])), width=widths[0], overflow="fold")
    for index, width in zip(columns, widths[1:], strict=True):
        drawn.add_column(Text(visible(table.headers[index + 1])), justify="right", overflow="fold", width=width)
    group = ""
    for row in table.rows:
        if row.apart:
            drawn.add_section()
        if row.group and row.group != group:
            group = row.group
            drawn.add_row(Text(visible(group), style="dim italic"))
        drawn.add_row(*_texts(row, columns))
    return drawn


def _texts(row: Row, columns: Sequence[int]) -> list[Text]:
    cells = [row.cells[index] for index in columns]
    return [Text(visible(row.label)), *(Text(_lines(cell), style="bold" if cell.strong else "") for cell in cells)]


def _lines(cell: Cell) -> str:
    return visible(f"{cell.text}\n{cell.sub}" if cell.sub else cell.text)


def _needs(cell: Cell) -> int:
    """Characters of the widest line; long words of settings may be broken."""
    return min(30, max(map(len, _lines(cell).split("\n"))))


def _narrowest(header: str) -> int:
    """Characters that a header needs: short ones stay on a line."""
    return len(header) if 0 < len(header) <= _UNBROKEN else max([len(word) for word in header.split()] or [1])

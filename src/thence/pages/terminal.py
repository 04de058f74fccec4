"""Tables in a terminal, narrow ones too."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.padding import Padding
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
        widths = self._widths(False)
        if not _fit(labels, widths, width) and _fit(labels, narrow := self._widths(True), width):
            widths = narrow  # headers broken at hyphens keep the table in one piece
        groups = min(_MOST_LABEL, max([len(row.group) for row in table.rows] + [0]))
        if groups > labels and _fit(groups, widths, width):
            labels = groups  # headings of groups are broken only where there is no room
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

    def _widths(self, hyphens: bool) -> list[int]:
        """Characters of each column but the first; headers are broken at spaces, or at hyphens too."""
        return [
            max([_narrowest(header, hyphens), *(_needs(row.cells[index]) for row in self.table.rows)])
            for index, header in enumerate(self.table.headers[1:])
        ]


def _fit(labels: int, widths: Sequence[int], width: int) -> bool:
    return labels + sum(_GAP + each for each in widths) <= width


def with_notes(table: Table) -> Group:
    """A table and, below it, how to read it."""
    return Group(TableView(table), *(Text(visible(note), style="dim") for note in table.notes))


def facts(
    rows: Iterable[Sequence[str | Text]], *, widths: Sequence[int | None] = (), indent: int = 0, gap: int = _GAP
) -> Padding:
    """Rows without headings or rules: names, and last what is said of them, which wraps and is never cut.

    Args:
        rows: all of the same length, at least one.
        widths: of the columns before the last; None or missing: that of their longest text.
        indent: characters left of the first column.
        gap: characters between two columns.
    """
    found = [[Text(visible(cell)) if isinstance(cell, str) else cell for cell in row] for row in rows]
    drawn = Drawn.grid(padding=(0, gap, 0, 0))
    for index in range(len(found[0]) - 1):
        width = widths[index] if index < len(widths) else None
        drawn.add_column(width=width, no_wrap=width is None)
    drawn.add_column(overflow="fold")
    for row in found:
        drawn.add_row(*row)
    return Padding(drawn, (0, 0, 0, indent), expand=False)


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


def _narrowest(header: str, hyphens: bool = False) -> int:
    """Characters that a header needs: short ones stay on a line, others are broken at spaces, or at hyphens too."""
    if 0 < len(header) <= _UNBROKEN:
        return len(header)
    words = _glued(header).replace("-", "- ") if hyphens else _glued(header)
    return max([len(word) for word in words.split(" ")] or [1])

"""The tables of a comparison in the terminal, narrow ones too."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from thence.compare.outcome import outcome
from thence.compare.page import parts_of
from thence.compare.statistics import Statistics
from thence.compare.tables import Cell, Row, Table
from thence.compare.words import notes
from thence.report.samples import visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

IN_TERMINAL = frozenset({"methods", "waterfall", "sensitivity", "short", "cost"})
_GAP = 2
_MOST_LABEL = 34


def print_comparison(statistics: Statistics, console: Console, kinds: Collection[str] = IN_TERMINAL) -> None:
    """Print outcome, notes and the tables of the sections of these kinds.

    Raises:
        RecipeError: a section does not fit the comparison.
    """
    console.print(visible(outcome(statistics)), markup=False, highlight=False)
    for note in notes(statistics):
        console.print(f"! {visible(note)}", markup=False, highlight=False)
    for part in parts_of(statistics, figures=False):
        if part.kind in kinds:
            console.print()
            console.print(visible(part.title), style="bold", markup=False, highlight=False)
            for table in part.tables:
                for drawn in terminal_tables(table, console.width):
                    console.print(drawn)
            for said in dict.fromkeys(note for table in part.tables for note in table.notes):
                console.print(visible(said), style="dim", markup=False, highlight=False)
    if statistics.comparison.failures:
        console.print()
        for failure in statistics.comparison.failures:
            said = f"failed: {failure.arm} on {failure.base}, seed {failure.seed}: {failure.why}"
            console.print(visible(said), markup=False, highlight=False)


def terminal_tables(table: Table, width: int) -> list[RenderableType]:
    """A table as one or more that fit the terminal: columns that do not fit go below, with the labels again.

    Args:
        table: what to draw.
        width: characters of a line.
    """
    labels = min(_MOST_LABEL, max(width // 3, 10), max([len(row.label) for row in table.rows], default=1))
    widths = [
        max([_wrapped(header)] + [_needs(row.cells[index]) for row in table.rows])
        for index, header in enumerate(table.headers[1:])
    ]
    parts: list[list[int]] = [[]]
    for index, needed in enumerate(widths):
        used = labels + sum(_GAP + widths[held] for held in parts[-1])
        if parts[-1] and used + _GAP + needed > width:
            parts.append([])
        parts[-1].append(index)
    return [_drawn(table, columns, [labels, *(widths[i] for i in columns)], columns is parts[0]) for columns in parts]


def _drawn(table: Table, columns: list[int], widths: list[int], first: bool) -> RenderableType:
    from rich.table import Table as Drawn
    from rich.text import Text

    title = visible(table.title) + ("" if first else " (further columns)")
    drawn = Drawn(title=Text(title), title_justify="left", box=None, padding=(0, _GAP, 0, 0), pad_edge=False)
    drawn.add_column(Text(visible(table.headers[0])), width=widths[0], overflow="fold")
    for index, width in zip(columns, widths[1:], strict=True):
        drawn.add_column(Text(visible(table.headers[index + 1])), justify="right", overflow="fold", width=width)
    group = ""
    for row in table.rows:
        if row.group and row.group != group:
            group = row.group
            drawn.add_row(Text(visible(group), style="dim italic"))
        drawn.add_row(*_texts(row, columns))
    return drawn


def _texts(row: Row, columns: list[int]) -> list[RenderableType]:
    from rich.text import Text

    cells = [row.cells[index] for index in columns]
    return [Text(visible(row.label)), *(Text(_lines(cell), style="bold" if cell.strong else "") for cell in cells)]


def _lines(cell: Cell) -> str:
    return visible(f"{cell.text}\n{cell.sub}" if cell.sub else cell.text)


def _needs(cell: Cell) -> int:
    """Characters of the wider line; long words of settings may be broken."""
    return min(30, max(len(cell.text), len(cell.sub)))


def _wrapped(header: str) -> int:
    return max([len(word) for word in header.split()] or [1])

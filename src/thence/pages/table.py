"""A table as plain data: what a page and a terminal draw."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """A cell: its text, smaller lines below it, and whether it is bold."""

    text: str
    sub: str = ""
    strong: bool = False


@dataclass(frozen=True)
class TableRow:
    """A row.

    Args:
        label: its first column.
        cells: the other columns.
        group: the heading that it stands under.
        apart: whether it is set off from the rows above: a mean of them, or their size.
    """

    label: str
    cells: tuple[Cell, ...]
    group: str = ""
    apart: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        title: above it, for example the base.
        headers: of the label and of each cell.
        notes: how to read it.
        paper: whether the numbers are a paper's, not those of the page.
        words: which cells of a row are words, read from the left and broken where there is no room.
    """

    title: str
    headers: tuple[str, ...]
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...] = ()
    paper: bool = False
    words: tuple[int, ...] = ()


NOTHING = Cell("–")

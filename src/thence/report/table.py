"""The results of a run as a table for the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from thence.report.outcome import half_width
from thence.report.run_files import Cell, read_run


def results_table(run_folder: Path) -> Table:
    """Accuracy in per cent with half its 95% interval; a row a model, a column a split and temperature.

    Raises:
        UserError: there is no such folder.
    """
    run = read_run(run_folder)
    table = Table(title="Accuracy, % (± half of the 95% interval)", title_justify="left")
    table.add_column("model")
    for split, temperature in run.columns:
        table.add_column(f"{split}\nT = {temperature:g}", justify="right")
    for subject in run.subjects:
        table.add_row(subject, *(_text(run.cell(subject, column)) for column in run.columns))
    sizes = [_sizes([cell for cell in run.cells if cell.column == column]) for column in run.columns]
    if run.columns:
        table.add_section()
        table.add_row("problems x samples", *sizes)
    return table


def _text(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    half = half_width(cell)
    text = f"{100 * cell.accuracy:.1f}" if half is None else f"{100 * cell.accuracy:.1f} ±{half:.1f}"
    return f"{text} ({cell.unknown} unknown)" if cell.unknown else text


def _sizes(cells: list[Cell]) -> str:
    """One size when all rows of a column share it, which they need not."""
    sizes = dict.fromkeys(
        "?" if cell.problems is None else f"{cell.problems:,} x {cell.samples or 1}" for cell in cells
    )
    return " / ".join(sizes)

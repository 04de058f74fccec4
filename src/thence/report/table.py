"""The results of a run as a table for the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from thence.report.run_files import Cell, RunFiles, read_run

NO_THRESHOLD = (
    "Mean reward: the reward gives degrees and states no score from which a response is right, so there is no accuracy "
    "(docs/evaluation.md)."
)


def results_table(run_folder: Path) -> Table:
    """Accuracy in per cent, or mean reward, with half its 95% interval; a row a model, a column a test set.

    Raises:
        UserError: there is no such folder.
    """
    run = read_run(run_folder)
    by_reward = [run.by_reward(column) for column in run.columns]
    mixed = any(by_reward) and not all(by_reward)
    what = "Mean reward" if by_reward and all(by_reward) else "Accuracy, %"
    table = Table(title=f"{what} (± half of the 95% interval)", title_justify="left")
    if any(by_reward):
        table.caption, table.caption_justify = NO_THRESHOLD, "left"
    table.add_column("model")
    for (split, temperature), reward in zip(run.columns, by_reward, strict=True):
        unit = "\nmean reward" if mixed and reward else ""
        table.add_column(f"{split}\nT = {temperature:g}{unit}", justify="right")
    for subject in run.subjects:
        table.add_row(subject, *(_text(run, run.cell(subject, column)) for column in run.columns))
    sizes = [_sizes([cell for cell in run.cells if cell.column == column]) for column in run.columns]
    if run.columns:
        table.add_section()
        table.add_row("problems x samples", *sizes)
    return table


def _text(run: RunFiles, cell: Cell | None) -> str:
    if cell is None:
        return "–"
    level = run.level(cell)
    text = level.shown if level.half is None else f"{level.shown} ±{level.half}"
    return f"{text} ({cell.unknown} unknown)" if cell.unknown else text


def _sizes(cells: list[Cell]) -> str:
    """One size when all rows of a column share it, which they need not."""
    sizes = dict.fromkeys(
        "?" if cell.problems is None else f"{cell.problems:,} x {cell.samples or 1}" for cell in cells
    )
    return " / ".join(sizes)

"""The results of a run as tables."""

from __future__ import annotations

from collections.abc import Sequence

from thence.pages.table import NOTHING, Cell, Table, TableRow
from thence.pipeline.run_files import Measurement, RunFiles

NO_THRESHOLD = (
    "Mean reward: the reward gives degrees and states no score from which a response is right, so there is no accuracy "
    "(docs/evaluation.md)."
)
_HOW_TO_READ = (
    "Rows are models: the base, or the model after the stage of that name. The 95% interval is written below each "
    "number; n is problems × samples a problem. T is the sampling temperature, 0 is greedy. The interval "
    "speaks of the choice of problems"
)


def results_table(run: RunFiles, whole: bool = False) -> Table:
    """Accuracy in per cent, or mean reward, with its 95% interval below it; a row a model, a column a test set.

    Args:
        run: what was measured.
        whole: with sizes below the numbers, as a page has room for; else sizes stand in a last row.
    """
    by_reward = [run.by_reward(column) for column in run.columns]
    mixed = any(by_reward) and not all(by_reward)
    what = "Mean reward" if by_reward and all(by_reward) else "Accuracy, %"
    headers = ["model"]
    for (split, temperature), reward in zip(run.columns, by_reward, strict=True):
        headers.append(f"{split}, T = {temperature:g}{', mean reward' if mixed and reward else ''}")
    rows = [
        TableRow(subject, tuple(measured_cell(run, run.cell(subject, column), whole) for column in run.columns))
        for subject in run.subjects
    ]
    if whole:
        other_seeds = "" if run.recipe.get("seed") is None else ", not of other seeds"
        notes = (f"{_HOW_TO_READ}{other_seeds}.",)
        return Table("", (what, *headers[1:]), tuple(rows), notes)
    if run.columns:
        sizes = [_sizes([cell for cell in run.cells if cell.column == column]) for column in run.columns]
        rows.append(TableRow("problems x samples", tuple(map(Cell, sizes)), apart=True))
    title = f"{what} (95% interval below)"
    return Table(title, tuple(headers), tuple(rows), (NO_THRESHOLD,) if any(by_reward) else ())


def measured_cell(run: RunFiles, cell: Measurement | None, whole: bool) -> Cell:
    """A measurement with its interval, and with its size where the table is ``whole``; a dash for none."""
    if cell is None:
        return NOTHING
    level = run.level(cell)
    if not whole:
        return Cell(f"{level.shown} ({cell.unknown} unknown)" if cell.unknown else level.shown, level.interval or "")
    size = _count(cell.problems) + (f" × {cell.samples:,}" if (cell.samples or 1) > 1 else "")
    return Cell(level.shown, "\n".join(filter(None, [level.interval, f"n = {size}"])))


def _sizes(cells: Sequence[Measurement]) -> str:
    """One size when all rows of a column share it, which they need not."""
    sizes = dict.fromkeys(
        "?" if cell.problems is None else f"{cell.problems:,} x {cell.samples or 1}" for cell in cells
    )
    return " / ".join(sizes)


def verdicts_table(run: RunFiles) -> Table:
    """Counts of verdicts, lengths and truncation; a row an evaluation stage and test set."""
    degrees = any(cell.graded for cell in run.cells)
    headers = ["Stage and test set", "Right", "Wrong", *(["Graded"] if degrees else []), "Unknown"]
    rows = []
    for cell in run.cells:
        counts = [cell.right, cell.wrong, *([cell.graded] if degrees else []), cell.unknown]
        texts = [_count(count) for count in counts]
        texts += ["–" if cell.reward is None else f"{cell.reward:.3f}"]
        texts += ["–" if cell.mean_tokens is None else f"{cell.mean_tokens:,.1f}", _count(cell.truncated)]
        label = f"{cell.stage}: {cell.split}, T = {cell.temperature:g}"
        rows.append(TableRow(label, tuple(map(Cell, texts))))
    note = "Counts of responses. "
    if degrees:
        note += "Graded: the reward gave a degree and states no score from which a response is right, so the table "
        note += "shows mean rewards. "
    note += "Unknown: the checker could not decide; it counts as not right, and is in no mean reward. "
    note += "Truncated: cut off at the limit of tokens."
    return Table("", (*headers, "Mean reward", "Mean length, tokens", "Truncated"), tuple(rows), (note,))


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"

"""What a run's numbers say, in a sentence that claims no more than they do."""

from __future__ import annotations

from thence.report.run_files import Cell, RunFiles


def outcome(run: RunFiles) -> str:
    """One or two sentences: how accuracy went from model to model, and whether the last intervals overlap.

    The first column in which the most models were measured speaks for the run; the others are counted.
    """
    if not run.cells:
        return "No evaluation has finished yet." if run.stages else "The folder holds no results."
    depth = {column: _path(run, column) for column in run.columns}
    main = max(run.columns, key=lambda column: len(depth[column]))
    path = depth[main]
    place = f"On {main[0]} at temperature {main[1]:g}"
    if len(path) == 1:
        only = path[0]
        return f"{place}, {only.subject} answers {percent(only.accuracy)}{_interval(only)} of {_n(only)} right."
    steps = ", ".join(f"{percent(cell.accuracy)} ({cell.subject})" for cell in path)
    text = f"{place}, accuracy went {steps}; n = {_n(path[-1])}. {_judged(path[-2], path[-1])}"
    others = [depth[column] for column in run.columns if column != main and len(depth[column]) > 1]
    return text + _elsewhere(others) if others else text


def overlap(one: Cell, other: Cell) -> bool | None:
    """Whether two 95% intervals overlap; None when one is not known."""
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return None
    return one.low <= other.high and other.low <= one.high


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * share:.1f}%"


def half_width(cell: Cell) -> float | None:
    """Half the 95% interval, in percentage points."""
    return None if cell.low is None or cell.high is None else 50 * (cell.high - cell.low)


def _path(run: RunFiles, column: tuple[str, float]) -> list[Cell]:
    cells = (run.cell(subject, column) for subject in run.subjects)
    return [cell for cell in cells if cell is not None]


def _elsewhere(paths: list[list[Cell]]) -> str:
    """How the last step went in the other columns, counted."""
    apart = [path for path in paths if overlap(path[-2], path[-1]) is False]
    up = sum(path[-1].accuracy > path[-2].accuracy for path in apart)
    others = "the other column" if len(paths) == 1 else f"the {len(paths)} other columns"
    return (
        f" In {len(apart)} of {others} the last two models differ beyond their intervals"
        f" ({up} up, {len(apart) - up} down)."
    )


def _judged(before: Cell, after: Cell) -> str:
    both = f"The 95% intervals of {before.subject} and {after.subject}"
    overlapping = overlap(before, after)
    if overlapping is None:
        return "Without intervals nothing can be said about the difference."
    if overlapping:
        return f"{both} overlap: these numbers alone do not tell the two apart."
    direction = "higher" if after.accuracy > before.accuracy else "lower"
    return f"{both} do not overlap: {after.subject} is {direction} on these problems, with this one seed."


def _interval(cell: Cell) -> str:
    if cell.low is None or cell.high is None:
        return ""
    return f" (95% interval {percent(cell.low)} to {percent(cell.high)})"


def _n(cell: Cell) -> str:
    problems = "an unknown number of problems" if cell.problems is None else f"{cell.problems:,} problems"
    return problems if (cell.samples or 1) == 1 else f"{problems} × {cell.samples} samples"

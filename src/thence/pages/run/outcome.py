"""What a run's numbers say, in a sentence that claims no more than they do."""

from __future__ import annotations

from thence.pipeline.run_files import Level, Measurement, RunFiles


def outcome(run: RunFiles) -> str:
    """One or two sentences: how accuracy or mean reward went from model to model, and if the last intervals overlap.

    The first column in which the most models were measured speaks for the run; the others are counted.
    """
    if not run.cells:
        return "No evaluation has finished yet." if run.stages else "The folder holds no results."
    depth = {column: _path(run, column) for column in run.columns}
    main = max(run.columns, key=lambda column: len(depth[column]))
    path = depth[main]
    place = f"On {main[0]} at temperature {main[1]:g}"
    levels = [run.level(cell) for cell in path]
    if len(path) == 1:
        only, level = path[0], levels[0]
        between = f" (95% interval {_ends(level)})" if level.interval else ""
        if level.by_reward:
            return f"{place}, the mean reward of {only.subject} is {level.shown}{between}; n = {_n(only)}."
        return f"{place}, {only.subject} answers {_unit(level)}{between} of {_n(only)} right."
    steps = ", ".join(f"{_unit(level)} ({cell.subject})" for cell, level in zip(path, levels, strict=True))
    what = "the mean reward" if levels[-1].by_reward else "accuracy"
    text = f"{place}, {what} went {steps}; n = {_n(path[-1])}. {_judged(run, path[-2], path[-1])}"
    others = [depth[column] for column in run.columns if column != main and len(depth[column]) > 1]
    return text + _elsewhere(run, others) if others else text


def overlap(one: Level, other: Level) -> bool | None:
    """Whether two 95% intervals overlap; None when one is not known."""
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return None
    return one.low <= other.high and other.low <= one.high


def _path(run: RunFiles, column: tuple[str, float]) -> list[Measurement]:
    cells = (run.cell(subject, column) for subject in run.subjects)
    return [cell for cell in cells if cell is not None]


def _elsewhere(run: RunFiles, cells: list[list[Measurement]]) -> str:
    """How the last step went in the other columns, counted."""
    paths = [[run.level(cell) for cell in path] for path in cells]
    apart = [path for path in paths if overlap(path[-2], path[-1]) is False]
    up = sum(_above(path[-1], path[-2]) for path in apart)
    others = "the other column" if len(paths) == 1 else f"the {len(paths)} other columns"
    return (
        f" In {len(apart)} of {others} the last two models differ beyond their intervals"
        f" ({up} up, {len(apart) - up} down)."
    )


def _judged(run: RunFiles, before: Measurement, after: Measurement) -> str:
    both = f"The 95% intervals of {before.subject} and {after.subject}"
    was, now = run.level(before), run.level(after)
    overlapping = overlap(was, now)
    if overlapping is None:
        return "Without intervals nothing can be said about the difference."
    if overlapping:
        return f"{both} overlap: these numbers alone do not tell the two apart."
    direction = "higher" if _above(now, was) else "lower"
    return f"{both} do not overlap: {after.subject} is {direction} on these problems, with this one seed."


def _above(one: Level, other: Level) -> bool:
    return one.value is not None and other.value is not None and one.value > other.value


def _unit(level: Level) -> str:
    return level.shown if level.by_reward or level.value is None else f"{level.shown}%"


def _ends(level: Level) -> str:
    return (level.interval or "") if level.by_reward else f"{(level.interval or '').replace(' to ', '% to ')}%"


def _n(cell: Measurement) -> str:
    problems = "an unknown number of problems" if cell.problems is None else f"{cell.problems:,} problems"
    return problems if (cell.samples or 1) == 1 else f"{problems} × {cell.samples} samples"

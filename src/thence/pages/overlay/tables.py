"""Several runs side by side as tables: results, cost, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from thence.pages.run.numbers import totals
from thence.pages.run.tables import measured_cell
from thence.pages.table import NOTHING, Cell, Table, TableRow
from thence.pipeline.run_files import RunFiles
from thence.wording import duration

Named = Mapping[str, RunFiles]
"""Runs by the name that the page gives them."""


def results_of_all(runs: Named, whole: bool = False) -> Table:
    """Accuracy in per cent, or mean reward, with its 95% interval; a row a model of a run, grouped by the model.

    Args:
        whole: with sizes below the numbers, as a page has room for.
    """
    columns = list(dict.fromkeys(column for run in runs.values() for column in run.columns))
    subjects = list(dict.fromkeys(subject for run in runs.values() for subject in run.subjects))
    by_reward = {column: any(run.by_reward(column) for run in runs.values()) for column in columns}
    what = "Mean reward" if by_reward and all(by_reward.values()) else "Accuracy, %"
    mixed = what == "Accuracy, %" and any(by_reward.values())
    rows = [
        TableRow(
            name,
            tuple(measured_cell(run, run.cell(subject, column), whole) for column in columns),
            f"after {subject}" if subject != "base" else subject,
        )
        for subject in subjects
        for name, run in runs.items()
        if subject in run.subjects
    ]
    headers = [
        f"{split}, T = {temperature:g}{', mean reward' if mixed and by_reward[split, temperature] else ''}"
        for split, temperature in columns
    ]
    note = (
        "The 95% interval is written below each number. It speaks of the choice of problems, not of other seeds, so "
        "two runs may differ by their seeds alone; thence compare tells these apart."
    )
    return Table(f"{what} (95% interval below)", (what if whole else "run", *headers), tuple(rows), (note,))


def cost_of_all(runs: Named) -> Table:
    """Steps, tokens, FLOPs and time of every training stage of every run."""
    rows = []
    for name, run in runs.items():
        for stage in run.training:
            sums = totals(stage)
            cells = [
                f"{sums['steps']:,}",
                _count(sums["trained_tokens"]),
                "–" if sums["flops"] is None else f"{sums['flops']:.3g}",
                "–" if sums["seconds"] is None else duration(sums["seconds"]),
            ]
            rows.append(TableRow(name, tuple(map(Cell, cells)), stage.stage))
    rows.sort(key=lambda row: [training for run in runs.values() for training in _stages(run)].index(row.group))
    return Table("", ("Run", "Steps", "Trained tokens", "FLOPs", "Time"), tuple(rows))


def settings_apart(runs: Named) -> Table:
    """The fields of the recipes in which the runs differ; a row a field, a column a run.

    A stage that a run does not have is told by its list of stages, not by every field of the stage.
    """
    flat = {name: dict(_fields(run.recipe)) for name, run in runs.items()}
    names = list(dict.fromkeys(field for fields in flat.values() for field in fields if field != "folder"))

    def differs(field: str) -> bool:
        table = field.partition(".")[0]
        return len({repr(flat[name].get(field)) for name, run in runs.items() if table in run.recipe}) > 1

    rows = [TableRow(field, tuple(_setting(flat[name], field) for name in runs)) for field in names if differs(field)]
    return Table("", ("Setting", *runs), tuple(rows), words=tuple(range(len(runs))))


def _stages(run: RunFiles) -> list[str]:
    return [training.stage for training in run.training]


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _setting(fields: Mapping[str, Any], field: str) -> Cell:
    if field not in fields:
        return NOTHING
    value = fields[field]
    return Cell(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def _fields(table: Mapping[str, Any], above: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Names with dots, and values."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _fields(value, (*above, str(name)))
        else:
            yield ".".join((*above, str(name))), value

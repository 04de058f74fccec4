"""When to leave SFT: the regimes of a stage's held-out loss as a table, and which model the stage leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from thence.pages.table import Cell, Table, TableRow
from thence.pipeline.regimes import SEVERE, STABLE, HeldOut, regimes
from thence.pipeline.run_files import StageMetrics

_FEWEST = 3
"""Measurements below which a curve has no regimes to speak of."""


def held_out_regimes(training: StageMetrics) -> list[HeldOut]:
    """The regimes of a stage's held-out loss; empty where it was measured less than three times."""
    steps, losses = training.series("held_out_loss")
    return regimes([int(step) for step in steps], losses) if len(steps) >= _FEWEST else []


def leaving_table(training: StageMetrics, stage: Mapping[str, Any], whole: bool) -> Table | None:
    """The regimes of a stage, a row each; None where its held-out loss says nothing of them.

    Args:
        stage: its table in the recipe.
        whole: the stage has ended, so that its model is known.
    """
    found = held_out_regimes(training)
    if not found:
        return None
    left = _left(training, found) if whole else None
    rows = []
    for regime, group in groupby(found, key=lambda measured: measured.regime):
        spans = list(group)
        here = left is not None and left in spans
        cells = (
            Cell(_span([measured.step for measured in spans], "d")),
            Cell(_span([measured.loss for measured in spans], ".4g")),
        )
        rows.append(TableRow(regime, tuple(Cell(cell.text, strong=here) for cell in cells)))
    return Table("", ("Regime", "Steps", "Held-out loss"), tuple(rows), tuple(_notes(training, found, left, stage)))


def _left(training: StageMetrics, found: Sequence[HeldOut]) -> HeldOut | None:
    """The measurement of the model that the stage leaves."""
    step = training.best_step or int(training.series("step")[0][-1])
    return next((measured for measured in found if measured.step == step), None)


def _notes(
    training: StageMetrics, found: Sequence[HeldOut], left: HeldOut | None, stage: Mapping[str, Any]
) -> list[str]:
    notes = []
    least = min(found, key=lambda measured: measured.loss)
    if left is not None:
        chosen = ", the smallest held-out loss" if left is least else f", {left.loss / least.loss:.2f} times the least"
        notes.append(f"The stage leaves the model of step {left.step} ({left.regime}{chosen}).")
        if left is not least and training.best_step is None:
            notes.append(f'The least is at step {least.step}: stop = "held-out" leaves that model.')
    notes.append(
        f"Stable: up to {STABLE:.2f} times the smallest held-out loss. Adaptive: before. Mild: after, below "
        f"{SEVERE:.2f} times. Severe: from there on (arXiv 2512.11470)."
    )
    if stage.get("schedule", "cosine") != "constant":
        notes.append(
            "The learning rate changes while the loss is measured, so a loss that stops falling may come from the rate "
            "and not from the number of steps."
        )
    return notes


def _span(values: Sequence[float], form: str) -> str:
    """One value, or the smallest and the largest."""
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"

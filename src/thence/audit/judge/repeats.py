"""Weights per example where some examples stand in a step more than once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from thence.audit.objectives import OBJECTIVES, StepRows
from thence.audit.result import RESPONSE_ROLES, SequenceWeights, StepResult


def per_example(step: StepResult, asked: str) -> StepResult:
    """The step with the weights that every example got in all its rows, over those of a step in which it stands once.

    Args:
        asked: a key of ``OBJECTIVES``.
    """
    times = Counter(row.example for row in step.sequences)
    if max(times.values(), default=1) == 1:
        return step
    # A repeated row weighs like any other row of its step; asked for is what a step without repeats would give it.
    once = list({row.example: row for row in step.sequences}.values())
    asked_each = dict(zip([r.example for r in once], OBJECTIVES[asked].weights(_rows(once)), strict=True))
    asked_here = OBJECTIVES[asked].weights(_rows(step.sequences))
    factors = [
        float(here / asked_each[row.example] * times[row.example])
        for row, here in zip(step.sequences, asked_here, strict=True)
    ]
    sequences = tuple(
        replace(
            row,
            weight=row.weight * factor,
            tokens=tuple(replace(token, ratio=token.ratio * factor) for token in row.tokens),
        )
        for row, factor in zip(step.sequences, factors, strict=True)
    )
    tokens = [t for row in {r.example: r for r in sequences}.values() for t in row.tokens if t.role in RESPONSE_ROLES]
    ratios, ideal = np.array([t.ratio for t in tokens]), np.abs([t.ideal for t in tokens])
    lost = float((ideal * np.clip(1 - ratios, 0, None)).sum() / ideal.sum()) if ideal.sum() else step.lost
    return replace(
        step, sequences=sequences, smallest=float(ratios.min()), largest=float(ratios.max()), lost=max(step.lost, lost)
    )


def _rows(sequences: list[SequenceWeights] | tuple[SequenceWeights, ...]) -> StepRows:
    lengths = [sum(token.role in RESPONSE_ROLES for token in row.tokens) for row in sequences]
    micro = [-1 if row.micro_batch is None else row.micro_batch for row in sequences]
    return StepRows(np.array(lengths), np.array(micro), np.array([-1 if r.rank is None else r.rank for r in sequences]))

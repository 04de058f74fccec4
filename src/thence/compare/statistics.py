"""What the runs of a comparison say: means with intervals, and differences with corrected p-values.

An arm's score on a base in a column is its accuracy, mean over problems and then over seeds. The interval speaks of
both: other seeds and other problems, see :mod:`thence.stats.resample`. A difference pairs the runs of two arms by
base, seed and problem; its p-value is Student's t of the same standard error, so it respects that seeds are few (with
five seeds a difference must be about 2.8 standard errors) and has no smallest value above zero, as a sign test or a
permutation of five seeds (1/16) would have. P-values are corrected by Holm's method for the arms that were planned.
With many bases the same is done over blocks, a block being one base with one seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from thence.compare.decisions import Decisions, decisions_of
from thence.compare.result import ALL_BASES, Column, Comparison, Run
from thence.stats.multiplicity import holm
from thence.stats.paired import Paired, paired_differences
from thence.stats.proportion import mean_share
from thence.stats.resample import Scores, spread

REPLICATES = 2000
LEVEL = 0.05

Over = Literal["problems and seeds", "problems"]
"""What an interval speaks of. With a single seed it says nothing about other seeds."""


@dataclass(frozen=True)
class Estimate:
    """An arm's score. Shares are between 0 and 1.

    Args:
        std: standard deviation over seeds (n - 1); None with one seed.
        low, high: 95% interval.
        seeds, problems, samples: what it was measured on. Over all bases, ``seeds`` counts blocks: a base with a seed.
    """

    mean: float
    std: float | None
    low: float
    high: float
    seeds: int
    problems: int
    samples: int
    over: Over


@dataclass(frozen=True)
class Difference:
    """An arm less another, paired.

    Args:
        low, high: 95% interval, not corrected for the number of arms.
        p: of no difference; with one seed it speaks of problems only.
        corrected: p by Holm's method.
        significant: corrected p below 0.05, interval without zero, and at least two seeds.
        seeds: that both arms have.
    """

    arm: str
    other: str
    mean: float
    low: float
    high: float
    p: float
    corrected: float
    significant: bool
    seeds: int
    over: Over


@dataclass(frozen=True)
class Statistics:
    """All estimates of a comparison, and the differences to its reference.

    Args:
        replicates, seed: of the bootstrap.
        estimates, differences: by arm, base and column; what no finished run tells is left out.
        decisions: the named contrasts, and the covariate of blocks.
    """

    comparison: Comparison
    replicates: int
    seed: int
    estimates: Mapping[tuple[str, str, Column], Estimate]
    differences: Mapping[tuple[str, str, Column], Difference]
    decisions: Decisions

    def pairs(self, base: str, column: Column, pairs: Sequence[tuple[str, str]]) -> list[Difference | None]:
        """Differences of other pairs (arm, other), corrected for their own number; None where runs are missing."""
        return differences(self.comparison, base, column, pairs, self.replicates, self.seed)


def statistics(comparison: Comparison, replicates: int = REPLICATES, seed: int = 0) -> Statistics:
    """Estimates of every arm on every base in every column, paired differences to the reference, and decisions.

    Where there are many bases, also those over all of them, under :data:`~thence.compare.result.ALL_BASES`.

    Raises:
        RecipeError: the contrasts of the comparison are not those that a recipe may have.
    """
    estimates, to_reference = {}, {}
    others = [arm.name for arm in comparison.arms if arm.name != comparison.reference]
    for base in [*([ALL_BASES] if comparison.is_pooled else []), *comparison.bases]:
        for column in comparison.columns:
            for arm in comparison.arms:
                estimate = estimate_of(comparison.runs_of(arm.name, base), column, replicates, seed)
                if estimate is not None:
                    estimates[arm.name, base, column] = estimate
            pairs = [(name, comparison.reference) for name in others]
            for difference in differences(comparison, base, column, pairs, replicates, seed):
                if difference is not None:
                    to_reference[difference.arm, base, column] = difference
    return Statistics(comparison, replicates, seed, estimates, to_reference, decisions_of(comparison))


def estimate_of(runs: Sequence[Run], column: Column, replicates: int = REPLICATES, seed: int = 0) -> Estimate | None:
    """The score of an arm's runs in a column; None where none was measured."""
    measured = [m for m in (run.on(column) for run in runs) if m is not None and m.right]
    if not measured:
        return None
    rows = [np.array(m.right) / m.samples for m in measured]
    found = spread(rows, replicates, seed)
    problems = min(len(row) for row in rows)
    low, high = found.low, found.high
    if len(rows) == 1 or not found.se > 0:  # the interval of one evaluation; or every seed has the same score
        score = mean_share(rows[0].tolist() if len(rows) == 1 else [found.mean] * problems, measured[0].samples)
        low, high = score.low, score.high
    return Estimate(
        mean=found.mean,
        std=float(np.std([row.mean() for row in rows], ddof=1)) if len(rows) > 1 else None,
        low=max(0.0, low),
        high=min(1.0, high),
        seeds=len(rows),
        problems=problems,
        samples=min(m.samples for m in measured),
        over="problems and seeds" if len(rows) > 1 else "problems",
    )


def differences(
    comparison: Comparison,
    base: str,
    column: Column,
    pairs: Sequence[tuple[str, str]],
    replicates: int = REPLICATES,
    seed: int = 0,
) -> list[Difference | None]:
    """Paired differences of arms (arm, other) on a base in a column, corrected for the number of pairs.

    Returns:
        One for each pair; None where the two arms have no seed in common, and everywhere while a registered comparison
        is not finished.
    """
    if comparison.is_sealed:
        return [None] * len(pairs)
    paired = [_paired(comparison, base, column, *pair) for pair in pairs]
    found = [_spread(rows, replicates, seed) if rows else None for rows in paired]
    known = [index for index, value in enumerate(found) if value is not None]
    corrected = dict(zip(known, holm([s.p_value for s in found if s is not None], len(pairs)), strict=True))
    result: list[Difference | None] = []
    for index, ((arm, other), rows, value) in enumerate(zip(pairs, paired, found, strict=True)):
        if value is None:
            result.append(None)
            continue
        low, high = max(-1.0, value.low), min(1.0, value.high)
        several = len(rows) > 1
        significant = several and corrected[index] < LEVEL and not low <= 0 <= high
        over: Over = "problems and seeds" if several else "problems"
        result.append(
            Difference(
                *(arm, other, value.difference, low, high),
                *(value.p_value, corrected[index], significant, len(rows), over),
            )
        )
    return result


def _spread(rows: list[Scores], replicates: int, seed: int) -> Paired:
    """The mean of differences; that of one seed as `thence eval --compare` has it."""
    if len(rows) == 1:
        return paired_differences(rows[0].tolist())
    found = spread(rows, replicates, seed)
    return Paired(found.mean, found.low, found.high, found.p, min(len(row) for row in rows))


def _paired(comparison: Comparison, base: str, column: Column, arm: str, other: str) -> list[Scores]:
    """Score differences of each problem, one array for each block that both arms have measured on the same problems."""
    theirs = {(run.base, run.seed): run.on(column) for run in comparison.runs_of(other, base)}
    rows = []
    for run in comparison.runs_of(arm, base):
        mine, its = run.on(column), theirs.get((run.base, run.seed))
        if mine and its and len(mine.right) == len(its.right) > 0:
            rows.append(np.array(mine.right) / mine.samples - np.array(its.right) / its.samples)
    return rows

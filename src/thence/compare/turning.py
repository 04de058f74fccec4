"""Where the order of two arms turns: their difference, block by block, against the covariate."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from thence.compare.decisions import BlockId, Decisions, scores_of
from thence.compare.result import Column, Comparison
from thence.stats.trend import Trend, trends


@dataclass(frozen=True)
class Turning:
    """An arm less another against the covariate.

    Args:
        blocks, covariate, differences: of each block that has both arms, as shares; ascending by covariate.
        line, monotone: fits with bands; None where there are too few blocks.
    """

    arm: str
    other: str
    column: Column
    blocks: tuple[BlockId, ...]
    covariate: tuple[float, ...]
    differences: tuple[float, ...]
    line: Trend | None
    monotone: Trend | None


def turnings(
    comparison: Comparison,
    decisions: Decisions,
    arms: Sequence[str],
    other: str,
    column: Column,
    bases: Collection[str] = (),
) -> list[Turning]:
    """Every arm less the other one; arms without a block in common with it are left out.

    Args:
        bases: of the blocks that count; empty: all.
    """
    scores, found = scores_of(comparison), []
    known = [block for block in comparison.blocks if block in decisions.values and (not bases or block[0] in bases)]
    for arm in arms:
        of = [(decisions.values[block], scores.difference(arm, other, block, column), block) for block in known]
        rows = sorted((z, d, block) for z, d, block in of if d is not None)
        if arm == other or not rows:
            continue
        covariate, differences = tuple(z for z, _, _ in rows), tuple(d for _, d, _ in rows)
        try:
            line, monotone = trends(covariate, differences)
        except ValueError:  # too few blocks to fit anything
            line = monotone = None
        blocks = tuple(block for _, _, block in rows)
        found.append(Turning(arm, other, column, blocks, covariate, differences, line, monotone))
    return found

"""What the named contrasts of a comparison decide: held, refuted, equal within the bound, or undecided.

For each block the difference of two arms is taken on the same problems, and each contrast is a test over blocks, see
:mod:`thence.stats.typical`. What it says is of other blocks on these problems: the luck of the problems that were drawn
is the same in all blocks, and no test over blocks can see it. A contrast is tested once, when all its blocks are
finished. A test that is looked at while blocks are still to come, and repeated until it likes, is wrong more often than
it says.

A contrast asks two questions: is the difference other than zero, and does it lie within the bound? One that expects
equality asks: does it lie within the bound, or beyond it? Of the two hypotheses at most one is true, so a contrast
counts once in the family. Primary contrasts share Holm's correction in this form
(:func:`thence.stats.multiplicity.holm_of_questions`): the chance that any verdict on any of them is wrong, its
direction included, is at most 5%. The others are exploratory: of their verdicts 5% are wrong on average (Y. Benjamini
and Y. Hochberg, 1995, over all their questions). Intervals are not corrected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from thence.compare.contrasts import Contrast, Covariate, find_column
from thence.compare.result import Column, Comparison, Measured
from thence.settings.validation import validated
from thence.stats.multiplicity import holm_of_questions
from thence.stats.typical import Strictest, Typical, adjustment, typical_mean, typical_slope

ERROR = 0.05
"""Share of wrong verdicts: in a family of primary contrasts at all, among exploratory verdicts on average."""

BlockId = tuple[str, int]
"""Base and seed."""
Judgement = Literal["held", "refuted", "equal", "undecided", "not tested"]


@dataclass(frozen=True)
class DecidedContrast:
    """A contrast and what its blocks say.

    Args:
        contrast: as the recipe has it.
        column: that it reports.
        planned, finished: blocks that are planned for it, and those whose runs are all there. Where halves of the
            covariate count and it is not known yet, these are those of all blocks.
        outcome: the verdict; ``equal`` only where another one was expected, else equality is ``held``.
        estimate, low, high: mean over blocks or slope, and its 95% interval, not corrected; None where it is not
            tested, and no interval where the blocks are too few for one.
        p, corrected: of no difference; where equality is expected, of one within the bound.
        p_equal, corrected_equal: of a difference as large as the bound; None without a bound.
        smallest: the smallest p value that so few blocks can give.
        differences: of each finished block, as shares.
        chosen: which of several others each block's difference is taken to.
    """

    contrast: Contrast
    column: Column
    planned: int
    finished: int
    outcome: Judgement = "not tested"
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    corrected: float | None = None
    p_equal: float | None = None
    corrected_equal: float | None = None
    smallest: float | None = None
    differences: Mapping[BlockId, float] = field(default_factory=dict)
    chosen: Mapping[BlockId, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Decisions:
    """All contrasts, primary ones first, and what is known of the covariate.

    Args:
        covariate: as the recipe has it.
        values: of the covariate, by block.
        reliability: share of the covariate's variance between blocks that is not noise of its measurement; None where
            it cannot be told.
    """

    contrasts: tuple[DecidedContrast, ...]
    covariate: Covariate | None
    values: Mapping[BlockId, float]
    reliability: float | None


def decisions_of(comparison: Comparison) -> Decisions:
    """Judge the contrasts of a comparison, finished or not.

    Raises:
        RecipeError: the contrasts are not those that a recipe may have.
    """
    scores, covariate = scores_of(comparison), covariate_of(comparison)
    column = find_column(covariate.column, comparison.columns) if covariate else None
    values, reliability = {}, None
    if covariate is not None and column is not None:
        known = {block: scores.at(covariate.arm, block, column) for block in comparison.blocks}
        rows = {block: m for block, m in known.items() if m is not None}
        values = {block: m.accuracy for block, m in rows.items()}
        reliability = reliability_of([np.array(m.right) / m.samples for m in rows.values()])
    contrasts = [validated(Contrast, dict(plain), f"contrasts.{i}") for i, plain in enumerate(comparison.contrasts)]
    tested = [_tested(contrast, comparison, scores, values) for contrast in contrasts]
    primary = _judged([each for each in tested if each[0].contrast.primary], holm_of_questions)
    others = _judged([each for each in tested if not each[0].contrast.primary], _false_discovery)
    return Decisions((*primary, *others), covariate, values, reliability)


def covariate_of(comparison: Comparison) -> Covariate | None:
    """The covariate of a comparison. Raises RecipeError."""
    return validated(Covariate, dict(comparison.covariate), "covariate") if comparison.covariate else None


@dataclass(frozen=True)
class Scored:
    """Measurements by arm and block, and then by column."""

    held: Mapping[tuple[str, BlockId], Mapping[Column, Measured]]

    def at(self, arm: str, block: BlockId, column: Column) -> Measured | None:
        """One measurement; None where it is missing."""
        found = self.held.get((arm, block), {}).get(column)
        return found if found is not None and found.right else None

    def difference(self, arm: str, other: str, block: BlockId, column: Column) -> float | None:
        """Accuracy of an arm less that of another on the same problems; None where one is missing."""
        mine, its = self.at(arm, block, column), self.at(other, block, column)
        if mine is None or its is None or len(mine.right) != len(its.right):
            return None
        return mine.accuracy - its.accuracy

    def best(self, arms: Sequence[str], block: BlockId, column: Column) -> str | None:
        """The best of several arms, the first of equals; None while one is missing."""
        found = [self.at(arm, block, column) for arm in arms]
        known = [m.accuracy for m in found if m is not None]
        return arms[int(np.argmax(known))] if len(known) == len(arms) else None


def scores_of(comparison: Comparison) -> Scored:
    """The measurements of a comparison's reported runs."""
    return Scored({(run.arm, (run.base, run.seed)): {m.column: m for m in run.measured} for run in comparison.runs})


def halved(blocks: Sequence[BlockId], values: Mapping[BlockId, float], which: str) -> list[BlockId]:
    """The blocks that count: all, or a half by the median of the covariate; with an odd number both halves hold it."""
    if which == "all":
        return list(blocks)
    middle = float(np.median([values[block] for block in blocks]))
    sign = 1 if which == "upper half" else -1
    return [block for block in blocks if sign * (values[block] - middle) >= 0]


def reliability_of(rows: Sequence[np.ndarray]) -> float | None:
    """Hoyt's reliability of blocks' mean scores, from problems (1941): 1 less noise over variance between blocks.

    Args:
        rows: the problems' scores of each block, in the same order of problems.

    Returns:
        Between 0 and 1; None with fewer than two blocks or problems, with different numbers of problems, or where all
        blocks score alike.
    """
    sizes = {len(row) for row in rows}
    if len(rows) < 2 or len(sizes) > 1 or sizes == {1}:
        return None
    scores = np.stack(rows)
    blocks, problems = scores.shape
    means = scores.mean(axis=1)
    between = problems * means.var(ddof=1)
    if between == 0:
        return None
    residual = scores - means[:, None] - scores.mean(axis=0) + scores.mean()
    noise = float((residual**2).sum()) / ((blocks - 1) * (problems - 1))
    return float(np.clip(1 - noise / between, 0, 1))


_Tested = tuple[DecidedContrast, Typical | Strictest | None]


def _tested(contrast: Contrast, comparison: Comparison, scores: Scored, values: Mapping[BlockId, float]) -> _Tested:
    """The contrast with its blocks' differences, and its test where all blocks are there."""
    column = find_column(contrast.column, comparison.columns)
    choose_on = find_column(contrast.choose_on, comparison.columns)
    assert column is not None and choose_on is not None, "contrasts were checked when the comparison was read"
    needs_covariate = contrast.kind == "slope" or contrast.degree > 0 or contrast.blocks != "all"
    blocks = list(comparison.blocks)
    if contrast.blocks != "all" and len(values) == len(blocks):
        blocks = halved(blocks, values, contrast.blocks)
    differences: dict[BlockId, float] = {}
    chosen: dict[BlockId, str] = {}
    for block in blocks:
        others = contrast.others
        other = others[0] if len(others) == 1 else scores.best(others, block, choose_on)
        found = None if other is None else scores.difference(contrast.arm, other, block, column)
        if other is not None and found is not None and (block in values or not needs_covariate):
            differences[block] = found
            if len(others) > 1:
                chosen[block] = other
    decision = DecidedContrast(contrast, column, len(blocks), len(differences), differences=differences, chosen=chosen)
    if len(differences) < len(blocks) or len(blocks) < 2:
        return decision, None
    d, z = list(differences.values()), [values[block] for block in differences if needs_covariate]
    if contrast.kind == "difference" and not contrast.degree:
        return decision, typical_mean(d)
    if len(set(z)) < 2 + max(0, contrast.degree - 1):  # nothing tells these blocks apart
        return decision, None
    if contrast.degree:
        return decision, typical_mean((adjustment(np.array(z), contrast.degree) @ np.array(d)).tolist())
    return decision, typical_slope(d, z)


def questions_of(contrast: Contrast, test: Typical | Strictest) -> list[float]:
    """The p values of a contrast: of its first question, and of equality within the bound where it has one."""
    bound = contrast.equal_within
    if bound is None:
        return [test.equal_to(0.0)]
    return [test.beyond(bound) if contrast.expect == "equal" else test.equal_to(0.0), test.within(bound)]


def judgement_of(contrast: Contrast, estimate: float, corrected: Sequence[float]) -> Judgement:
    """What corrected p values of the questions say of what was expected."""
    other, equal = corrected[0] < ERROR, len(corrected) > 1 and corrected[1] < ERROR
    if contrast.expect == "equal":
        return "held" if equal else "refuted" if other else "undecided"
    if other:
        return "held" if (estimate > 0) == (contrast.expect == "higher") else "refuted"
    return "equal" if equal else "undecided"


_Correct = Callable[[Sequence[Sequence[float]], int], list[list[float]]]


def _judged(tested: Sequence[_Tested], correct: _Correct) -> list[DecidedContrast]:
    """The verdicts of one family; contrasts that are not tested yet count in it."""
    asked = [questions_of(decision.contrast, test) for decision, test in tested if test is not None]
    corrected = iter(correct(asked, len(tested)))
    result = []
    for decision, test in tested:
        if test is None:
            result.append(decision)
            continue
        p, own = questions_of(decision.contrast, test), next(corrected)
        low, high = test.interval(1 - ERROR)
        result.append(
            DecidedContrast(
                *(decision.contrast, decision.column, decision.planned, decision.finished),
                outcome=judgement_of(decision.contrast, test.estimate, own),
                estimate=test.estimate,
                low=low if np.isfinite(low) else None,
                high=high if np.isfinite(high) else None,
                p=p[0],
                corrected=own[0],
                p_equal=p[1] if len(p) > 1 else None,
                corrected_equal=own[1] if len(own) > 1 else None,
                smallest=test.smallest,
                differences=decision.differences,
                chosen=decision.chosen,
            )
        )
    return result


def _false_discovery(asked: Sequence[Sequence[float]], tests: int) -> list[list[float]]:
    """Benjamini and Hochberg's correction over all questions; a contrast that is not tested yet counts as p = 1."""
    from scipy.stats import false_discovery_control

    if not asked:
        return []
    flat = [p for p_values in asked for p in p_values] + [1.0] * (tests - len(asked))
    corrected = iter(false_discovery_control(flat).tolist())
    return [[next(corrected) for _ in p_values] for p_values in asked]

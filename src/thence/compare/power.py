"""What the contrasts of a comparison can decide, by simulation, before any run.

Blocks' true differences spread as the pilot's did: the variance of its blocks' differences, less what the luck of its
responses added. On top comes the luck of the planned problems and responses. Differences are drawn from a normal
distribution with that variance, and each contrast is tested as :mod:`thence.compare.decisions` will test it, a primary
one at 5% over the number of primary contrasts: Holm's first and hardest step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from thence.compare.contrasts import AssumedSpread, Contrast, Power, find_column
from thence.compare.decisions import ERROR, BlockId, Scored, scores_of
from thence.compare.recipe import ComparisonRecipe
from thence.compare.result import Column, Comparison, Measured, read_results
from thence.errors import RecipeError, UserError
from thence.stats.typical import Numbers, adjustment, one_sided, sign_flips, slope_sides

REPLICATES = 2000
SEARCHED = 500
"""Replicates of a number of blocks that is tried."""
DRAWS = 2000
"""Relabellings of a simulated test: fewer than of a real one, which is a little harder to pass."""
MOST_BLOCKS = 512


@dataclass(frozen=True)
class Foreseen:
    """What a contrast can decide.

    Args:
        name, primary, expect: as the recipe has them.
        blocks: planned for it.
        problems, samples: of its test set.
        sd: standard deviation of a block's difference as it will be measured; of a slope, or
            where the covariate is taken out: about the line.
        sd_luck: the part of it that comes from the luck of responses.
        effect: true difference, or slope per unit of the covariate.
        level: of the test.
        power: chance to find it; where equality is expected, to find that it is beyond the bound.
        equal_at_zero: chance to decide "equal" where there is no difference; None without a bound.
        blocks_needed: blocks of the whole comparison that give the wanted chance: of the effect, or of "equal" where
            that is expected; None: more than any that were tried.
        origin: where the spread comes from.
        notes: what is to be known about it.
    """

    name: str
    primary: bool
    expect: str
    blocks: int
    problems: int
    samples: int
    sd: float
    sd_luck: float
    effect: float
    level: float
    power: float
    equal_at_zero: float | None
    blocks_needed: int | None
    origin: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Spread:
    """Between blocks: sd of true differences; and the variance that one response to one problem adds."""

    sd: float
    single: float
    origin: str
    problems: int | None = None
    notes: tuple[str, ...] = ()


def foresee(recipe: ComparisonRecipe, seed: int = 0) -> list[Foreseen]:
    """The chances of every contrast, primary ones first.

    Args:
        seed: of the simulation.

    Raises:
        RecipeError: there is no contrast, nothing tells the spread between blocks, or the pilot has not what is needed.
    """
    if not recipe.contrasts:
        raise RecipeError("there is nothing to decide", remedy="add a table [[contrasts]]", field="contrasts")
    power = recipe.power or Power()
    pilot = None if power.pilot is None or isinstance(power.pilot, AssumedSpread) else _pilot(power.pilot)
    primary = sum(contrast.primary for contrast in recipe.contrasts)
    ordered = sorted(recipe.contrasts, key=lambda contrast: not contrast.primary)
    return [
        _foreseen(recipe, contrast, power, pilot, ERROR / primary if contrast.primary else ERROR, seed)
        for contrast in ordered
    ]


def _pilot(name: str) -> Comparison:
    try:
        return read_results(Path(name))
    except UserError as error:
        remedy = "give the results.json of an earlier comparison, or an assumed spread: pilot = { sd = 0.1 }"
        raise RecipeError(error.problem, remedy=remedy, file=name, field="power.pilot") from None


def _foreseen(
    recipe: ComparisonRecipe, contrast: Contrast, power: Power, pilot: Comparison | None, level: float, seed: int
) -> Foreseen:
    column = find_column(contrast.column, recipe.columns())
    assert column is not None, "contrasts were checked when the comparison was read"
    spread = _spread(recipe, contrast, power, pilot, column)
    problems = _limit(recipe, column) or power.problems or spread.problems
    if problems is None:
        raise RecipeError(
            f"nothing says how many problems {column.split!r} has",
            remedy="give it a limit in [eval.splits], or give power.problems",
            field="power.problems",
        )
    samples = recipe.test().samples
    luck = spread.single / (problems * samples)
    sd = math.hypot(spread.sd, math.sqrt(luck))
    span, effect = _span(recipe, contrast, power, pilot), contrast.effect or power.effect
    if contrast.kind == "slope":
        effect /= span[1] - span[0]
    shown = _Simulated(contrast, level, sd, effect, span, seed)
    whole = len(recipe.blocks())
    planned = whole if contrast.blocks == "all" else -(-whole // 2)
    found, equal = shown.chances(planned, REPLICATES)
    return Foreseen(
        *(contrast.name, contrast.primary, contrast.expect, planned, problems, samples, sd, math.sqrt(luck), effect),
        *(level, found, equal if contrast.equal_within is not None else None),
        blocks_needed=_needed(shown, power.target, contrast.blocks != "all"),
        origin=spread.origin,
        notes=spread.notes,
    )


@dataclass(frozen=True)
class _Simulated:
    """A contrast with true differences of a known size."""

    contrast: Contrast
    level: float
    sd: float
    effect: float
    span: Sequence[float]
    seed: int

    def chances(self, blocks: int, replicates: int) -> tuple[float, float]:
        """The chance to find the effect, and the chance to decide "equal" where there is none."""
        noise = np.random.default_rng([self.seed, blocks]).normal(0, self.sd, (blocks, replicates))
        covariate = np.linspace(self.span[0], self.span[1], blocks)
        shift = np.full((blocks, 1), self.effect)
        if self.contrast.kind == "slope":
            shift = self.effect * covariate[:, None]
        elif degree := self.contrast.degree:
            noise = adjustment(np.linspace(0, 1, blocks), degree) @ noise
        bound = self.contrast.equal_within
        from_bound = bound if self.contrast.expect == "equal" and bound is not None else 0.0
        above, _ = self._sides(covariate, noise + shift, from_bound)
        found = float((2 * above < self.level).mean())
        if bound is None:
            return found, 0.0
        larger, _ = self._sides(covariate, noise, -bound)
        _, smaller = self._sides(covariate, noise, bound)
        return found, float((np.maximum(larger, smaller) < self.level).mean())

    def _sides(self, covariate: Numbers, differences: Numbers, bound: float) -> tuple[Numbers, Numbers]:
        """One-sided p values of the contrast's test, for many sets of blocks."""
        if self.contrast.kind == "slope":
            return slope_sides(covariate, differences, bound, DRAWS)
        return one_sided(sign_flips(len(covariate), DRAWS), differences, bound)

    def wanted(self, blocks: int, replicates: int) -> float:
        """The chance of the verdict that is expected."""
        return self.chances(blocks, replicates)[self.contrast.expect == "equal"]


def _needed(shown: _Simulated, target: float, half: bool) -> int | None:
    """The fewest blocks of the whole comparison whose chance reaches the target."""
    least = shown.contrast.least_blocks
    high = max(4, least)
    while high < MOST_BLOCKS and shown.wanted(high, SEARCHED) < target:
        high *= 2
    if high >= MOST_BLOCKS and shown.wanted(MOST_BLOCKS, SEARCHED) < target:
        return None
    low = least - 1 if high <= 5 else high // 2
    while high - low > 1:
        middle = (low + high) // 2
        enough = shown.wanted(middle, SEARCHED) >= target
        low, high = (low, middle) if enough else (middle, high)
    while shown.wanted(high, REPLICATES) < target:  # the few replicates of the search may have been lucky
        high += 1
    return 2 * high if half else high


def _limit(recipe: ComparisonRecipe, column: Column) -> int | None:
    """Problems of a test set as the recipe limits them."""
    test = recipe.test()
    return {**recipe.data, **test.data, **test.splits.get(column.split, {})}.get("limit")


def _span(recipe: ComparisonRecipe, contrast: Contrast, power: Power, pilot: Comparison | None) -> Sequence[float]:
    """The covariate's range; of no use to a difference."""
    if contrast.kind == "difference":
        return (0.0, 1.0)
    span = power.span
    if span is None and pilot is not None:
        values = list(_covariate(recipe, power, pilot).values())
        span = [min(values), max(values)] if values else None
    if span is None or span[0] >= span[1]:
        raise RecipeError(
            "nothing says over which range the covariate spreads",
            remedy="give power.span, for example [0.0, 0.6]",
            field="power.span",
        )
    return span


def _covariate(recipe: ComparisonRecipe, power: Power, pilot: Comparison) -> dict[BlockId, float]:
    """The covariate of the pilot's blocks; empty where it has not measured it."""
    covariate = recipe.covariate
    assert covariate is not None, "contrasts were checked when the comparison was read"
    column = find_column(_called(power, covariate.column or recipe.columns()[0].split), pilot.columns)
    scores, arm = scores_of(pilot), _called(power, covariate.arm)
    found = {} if column is None else {block: scores.at(arm, block, column) for block in _blocks(pilot)}
    return {block: m.accuracy for block, m in found.items() if m is not None}


def _called(power: Power, name: str) -> str:
    return power.names.get(name, name)


def _blocks(pilot: Comparison) -> list[BlockId]:
    return list(dict.fromkeys((run.base, run.seed) for run in pilot.runs))


def _spread(
    recipe: ComparisonRecipe, contrast: Contrast, power: Power, pilot: Comparison | None, column: Column
) -> _Spread:
    """The spread of a contrast's blocks: its own assumption, the pilot's, or the one assumed for all."""
    if contrast.sd is not None or isinstance(power.pilot, AssumedSpread):
        assumed = contrast.sd or (power.pilot.sd if isinstance(power.pilot, AssumedSpread) else 0.0)
        return _Spread(assumed, 0.5, "assumed")  # two arms at 50%, where luck is largest
    if pilot is None:
        raise RecipeError(
            "nothing says how much blocks differ",
            remedy="give power.pilot, the results.json of an earlier comparison, or assume: pilot = { sd = 0.1 }",
            field="power.pilot",
        )
    known, said = find_column(_called(power, contrast.column or column.split), pilot.columns), []
    if known is None:
        raise _missing(f"test set {_called(power, contrast.column or column.split)!r}", contrast)
    arms, scores, blocks = [contrast.arm, *contrast.others], scores_of(pilot), _blocks(pilot)
    for arm in arms:
        if not any(scores.at(_called(power, arm), block, known) for block in blocks):
            raise _missing(f"finished run of the arm {_called(power, arm)!r} on {known.split!r}", contrast)
    choose_on = find_column(_called(power, contrast.choose_on), pilot.columns) if contrast.choose_on else known
    if choose_on is None:
        choose_on = known
        said.append(f"{contrast.name}: the pilot has no {contrast.choose_on!r}; its best arm is that on {known.split}.")
    pairs = _pairs(scores, [_called(power, arm) for arm in arms], blocks, known, choose_on)
    if len(pairs) < 3:
        raise _missing("three blocks with all arms", contrast)
    covariate = _covariate(recipe, power, pilot) if contrast.kind == "slope" or contrast.degree else {}
    variance = _variance(pairs, covariate, max(1, contrast.degree))
    single, measured = _single(list(pairs.values()))
    luck = float(np.mean([single / (len(a.right) * a.samples) for a, _ in pairs.values()])) if measured else 0.0
    origin, problems = f"pilot, {len(pairs)} blocks", min(len(a.right) for a, _ in pairs.values())
    return _Spread(math.sqrt(max(0.0, variance - luck)), single, origin, problems, tuple(said))


def _missing(what: str, contrast: Contrast) -> RecipeError:
    return RecipeError(
        f"the pilot has no {what}",
        remedy=f"say in power.names what the pilot calls it, or assume a spread: sd in contrasts.{contrast.name}",
        field=f"contrasts.{contrast.name}",
    )


_Pair = tuple[Measured, Measured]


def _pairs(
    scores: Scored, arms: Sequence[str], blocks: Sequence[BlockId], column: Column, choose_on: Column
) -> dict[BlockId, _Pair]:
    """The first arm and the other one that it is compared with, in each block of the pilot that has both."""
    found = {}
    for block in blocks:
        other = arms[1] if len(arms) == 2 else scores.best(arms[1:], block, choose_on)
        mine, its = scores.at(arms[0], block, column), other and scores.at(other, block, column)
        if mine and its and len(mine.right) == len(its.right):
            found[block] = (mine, its)
    return found


def _variance(pairs: dict[BlockId, _Pair], covariate: dict[BlockId, float], degree: int) -> float:
    """Of the pilot's differences; about their line or curve where the covariate is known in enough blocks."""
    differences = {block: a.accuracy - b.accuracy for block, (a, b) in pairs.items()}
    known = [block for block in differences if block in covariate]
    z, d = np.array([covariate[block] for block in known]), np.array([differences[block] for block in known])
    if len(known) < degree + 3 or len(set(z.tolist())) <= degree:
        return float(np.var(list(differences.values()), ddof=1))
    residual = d - np.polyval(np.polyfit(z, d, degree), z)
    return float(residual @ residual) / (len(known) - degree - 1)


def _single(pairs: Sequence[_Pair]) -> tuple[float, bool]:
    """The variance that a single response to a single problem adds to a difference, and whether it was measured.

    With several responses a problem it is the unbiased estimate of p (1 - p). With one, it is at most that of problems
    that are all alike, and how much of the pilot's spread is luck cannot be told.
    """
    measured = all(m.samples > 1 for pair in pairs for m in pair)
    total = 0.0
    for pair in pairs:
        for m in pair:
            share = np.array(m.right) / m.samples
            own = share * (1 - share) * m.samples / (m.samples - 1) if measured else share.mean() * (1 - share.mean())
            total += float(np.mean(own))
    return total / len(pairs), measured

"""How a difference changes with a covariate: a line and a monotone curve with bands, and where they cross zero.

The band at a place is a bootstrap over blocks (pairs of covariate and difference are drawn together, so that it makes
no difference whether blocks spread alike everywhere). The 2.5% and 97.5% quantiles of the drawn fits lie too close: a
fit to n blocks that were drawn from n spreads too little by about sqrt((n - 2) / n), and quantiles have no tails for
few blocks. So their distances from the fit are widened by sqrt(n / (n - 2)) and by Student's t with n - 2 degrees of
freedom over its limit. The crossing's interval is where the band holds zero: the values of the covariate at which a
difference of zero is not ruled out, as E. Fieller's (1954) for a line. It may have several pieces.

Simulated, the line's band covers a true line in 94 to 96% of places, and the interval a true crossing in 93 to 98%
(6, 10, 24 and 40 blocks, the same spread everywhere or one that grows with the covariate).

The monotone curve (isotonic regression) makes no assumption but the order. Its band is a guide: in the same simulation
it covers 86 to 92% of places, least at the ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from thence.stats.spread import student_quantile

Curve = NDArray[np.float64]

REPLICATES = 1000
PLACES = 61
LEAST_BLOCKS = 4
"""With fewer, a line has no band to speak of."""
_MANY = 1e6


@dataclass(frozen=True)
class Crossing:
    """Where a fit is zero within the range of the covariate.

    Args:
        at: where; None where the fit does not cross zero in the range.
        low, high: ends of the places whose band holds zero; None where there is no such place.
        open_low, open_high: the interval goes on beyond the range's lower (upper) end.
        pieces: what the interval is made of, ascending. The band of a line may hold zero at both ends of the range, and
            rule it out in between.
    """

    at: float | None
    low: float | None
    high: float | None
    open_low: bool
    open_high: bool
    pieces: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Trend:
    """A fit at evenly spaced places over the range of the covariate.

    Args:
        places, fit, low, high: the places, the fit and the ends of its pointwise 95% band.
        crossing: where the fit is zero.
        slope: of a line; None of a monotone curve.
    """

    places: tuple[float, ...]
    fit: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    crossing: Crossing
    slope: float | None


@lru_cache(maxsize=256)
def trends(
    covariate: tuple[float, ...], differences: tuple[float, ...], replicates: int = REPLICATES, seed: int = 0
) -> tuple[Trend, Trend]:
    """A line and a monotone curve. The curve rises or falls, whichever the line does.

    Args:
        covariate, differences: one a block, in the same order.
        replicates, seed: of the bootstrap.

    Raises:
        ValueError: fewer than four blocks, or a covariate with fewer than three values.
    """
    if len(covariate) < LEAST_BLOCKS or len(set(covariate)) < 3:
        raise ValueError("a trend needs four blocks with three values of the covariate")
    order = np.lexsort((differences, covariate))
    z, d = np.asarray(covariate, dtype=np.float64)[order], np.asarray(differences, dtype=np.float64)[order]
    n = len(z)
    places = np.linspace(z[0], z[-1], PLACES)
    rng = np.random.default_rng([seed, n])
    counts = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(replicates)]).astype(np.float64)
    counts = counts[[np.ptp(z[row > 0]) > 0 for row in counts]]
    slope, _ = _line(z, d, np.ones(n))
    rises = slope >= 0

    def line(weights: Curve) -> Curve:
        own_slope, own_intercept = _line(z, d, weights)
        return own_intercept + own_slope * places

    def monotone(weights: Curve) -> Curve:
        return _monotone(z, d, weights, rises, places)

    return _trend(line, places, counts, slope), _trend(monotone, places, counts, None)


def _trend(fit_with: Callable[[Curve], Curve], places: Curve, counts: Curve, slope: float | None) -> Trend:
    n = counts.shape[1]
    fit = fit_with(np.ones(n))
    drawn = np.stack([fit_with(row) for row in counts])
    wider = np.sqrt(n / (n - 2)) * student_quantile(n - 2) / student_quantile(_MANY)
    low = fit - wider * np.maximum(0, fit - np.quantile(drawn, 0.025, axis=0))
    high = fit + wider * np.maximum(0, np.quantile(drawn, 0.975, axis=0) - fit)
    numbers = (tuple(map(float, values)) for values in (places, fit, low, high))
    return Trend(*numbers, crossing=_crossing(places, fit, low, high), slope=slope)


def _line(z: Curve, d: Curve, weights: Curve) -> tuple[float, float]:
    """Slope and intercept by weighted least squares."""
    total = weights.sum()
    middle, level = weights @ z / total, weights @ d / total
    slope = float((weights * (z - middle)) @ d / ((weights * (z - middle)) @ (z - middle)))
    return slope, float(level - slope * middle)


def _monotone(z: Curve, d: Curve, weights: Curve, rises: bool, places: Curve) -> Curve:
    """Isotonic regression, straight between blocks and flat beyond them."""
    from scipy.optimize import isotonic_regression

    values, group = np.unique(z, return_inverse=True)
    weight = np.bincount(group, weights=weights)
    level = np.bincount(group, weights=weights * d)
    there = weight > 0
    level = level[there] / weight[there]
    fitted = isotonic_regression(level, weights=weight[there], increasing=rises).x
    return np.interp(places, values[there], fitted)


def _crossing(places: Curve, fit: Curve, low: Curve, high: Curve) -> Crossing:
    held = (low <= 0) & (high >= 0)
    at = None
    signs = np.sign(fit)
    if (signs == 0).any() and not (signs == 0).all() and (signs.min() < 0 < signs.max()):
        at = float(places[signs == 0].mean())  # a monotone curve may stay at zero for a while
    elif signs.min() < 0 < signs.max():
        after = int(np.flatnonzero(signs != signs[0])[0])
        share = fit[after - 1] / (fit[after - 1] - fit[after])
        at = float(places[after - 1] + share * (places[after] - places[after - 1]))
    if not held.any():
        return Crossing(at, None, None, False, False)
    changes = np.flatnonzero(np.diff(np.concatenate([[False], held, [False]]).astype(int)))
    pieces = []
    for first, after in changes.reshape(-1, 2).tolist():
        begin = places[0] if first == 0 else _edge(places, low, high, first - 1, first)
        end = places[-1] if after == len(places) else _edge(places, low, high, after, after - 1)
        pieces.append((float(begin), float(end)))
    return Crossing(at, pieces[0][0], pieces[-1][1], bool(held[0]), bool(held[-1]), tuple(pieces))


def _edge(places: Curve, low: Curve, high: Curve, outside: int, inside: int) -> float:
    """Where the end of the band that rules zero out outside reaches zero."""
    bound = low if low[outside] > 0 else high
    share = bound[outside] / (bound[outside] - bound[inside])
    return float(places[outside] + share * (places[inside] - places[outside]))

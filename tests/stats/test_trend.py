"""Lines and monotone curves with bands: references, coverage, and crossings that are there or not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import isotonic_regression

from thence.stats.trend import LEAST_BLOCKS, trends


def made(blocks: int, level: float, slope: float, spread: float, draw: int) -> tuple[tuple[float, ...], ...]:
    rng = np.random.default_rng(draw)
    z = rng.uniform(0, 0.6, blocks)
    return tuple(z.tolist()), tuple((level + slope * z + rng.normal(0, spread, blocks)).tolist())


def test_the_line_is_that_of_least_squares_and_the_curve_that_of_scipy() -> None:
    z, d = made(20, 0.3, -0.8, 0.1, 1)
    line, curve = trends(z, d, 50)
    slope, level = np.polyfit(z, d, 1)
    assert line.slope == pytest.approx(slope)
    assert line.fit == pytest.approx([level + slope * place for place in line.places])
    order = np.argsort(z)
    isotonic = isotonic_regression(np.array(d)[order], increasing=False).x
    assert curve.fit == pytest.approx(np.interp(curve.places, np.array(z)[order], isotonic))
    assert all(a >= b - 1e-12 for a, b in zip(curve.fit, curve.fit[1:], strict=False))


def test_blocks_of_the_same_covariate_count_together() -> None:
    _, curve = trends((0.1, 0.1, 0.3, 0.3, 0.5), (0.0, 0.2, 0.4, 0.6, 0.9), 50)
    assert (curve.fit[0], curve.fit[30], curve.fit[-1]) == pytest.approx((0.1, 0.5, 0.9))


def test_band_and_crossing_of_a_line_cover_the_truth() -> None:
    held, crossed = [], []
    for draw in range(120):
        z, d = made(16, 0.3, -0.9, 0.1, draw)
        line, _ = trends(z, d, 200)
        truth = 0.3 - 0.9 * np.array(line.places)
        held.append(np.mean((np.array(line.low) <= truth) & (truth <= np.array(line.high))))
        crossing = line.crossing
        assert crossing.low is not None and crossing.high is not None
        crossed.append(crossing.low <= 1 / 3 <= crossing.high)
    assert 0.9 <= np.mean(held) <= 0.985 and 0.9 <= np.mean(crossed) <= 1.0


def test_a_clear_turn_is_found_by_both_fits_with_an_interval_inside_the_range() -> None:
    z, d = made(24, 0.3, -0.9, 0.03, 4)
    for trend in trends(z, d):
        crossing = trend.crossing
        assert crossing.at == pytest.approx(1 / 3, abs=0.04)
        assert crossing.low is not None and crossing.high is not None
        assert crossing.low < crossing.at < crossing.high and crossing.high - crossing.low < 0.15
        assert not crossing.open_low and not crossing.open_high


def test_where_nothing_turns_none_is_named() -> None:
    for trend in trends(*made(24, 0.5, 0.1, 0.05, 5)):
        assert (trend.crossing.at, trend.crossing.low, trend.crossing.high) == (None, None, None)


def test_an_interval_that_goes_on_beyond_the_range_says_so() -> None:
    line, _ = trends(*made(10, 0.02, -0.1, 0.2, 6))
    assert line.crossing.open_low and line.crossing.open_high


def test_the_order_of_blocks_does_not_matter() -> None:
    z, d = made(12, 0.1, -0.5, 0.1, 7)
    assert trends(z, d, 100) == trends(z[::-1], d[::-1], 100)


def test_too_few_blocks_are_refused() -> None:
    few = tuple(range(LEAST_BLOCKS - 1))
    with pytest.raises(ValueError, match="four blocks"):
        trends(few, few)
    with pytest.raises(ValueError, match="three values"):
        trends((0.1, 0.1, 0.3, 0.3), (1.0, 2.0, 3.0, 4.0))

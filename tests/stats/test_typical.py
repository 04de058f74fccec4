"""Tests of a mean or slope over blocks: scipy's own as the reference, the level they promise, and symmetries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import permutation_test

from thence.stats.typical import (
    DRAWS,
    Typical,
    adjustment,
    one_sided,
    sign_flips,
    slope_sides,
    typical_mean,
    typical_slope,
)

BLOCKS = st.lists(st.integers(-50, 50).map(lambda value: value / 50), min_size=3, max_size=9)


@pytest.mark.parametrize("bound", [0.0, 0.1, -0.3])
@pytest.mark.parametrize("blocks", [2, 5, 9])
def test_sign_flips_of_a_mean_are_those_of_scipy(blocks: int, bound: float) -> None:
    d = np.random.default_rng(blocks).normal(0.15, 0.3, blocks)
    found = typical_mean(d.tolist())
    for alternative, ours in (
        ("greater", found.above(bound)),
        ("less", found.below(bound)),
        ("two-sided", found.equal_to(bound)),
    ):
        theirs = permutation_test(
            (d - bound, np.zeros(blocks)),
            lambda x, y, axis: (x - y).mean(axis=axis),
            permutation_type="samples",
            alternative=alternative,
            n_resamples=np.inf,
            vectorized=True,
        )
        assert ours == pytest.approx(theirs.pvalue, abs=1e-12)


@pytest.mark.parametrize("bound", [0.0, 0.5])
def test_permutations_of_a_slope_are_those_of_scipy(bound: float) -> None:
    rng = np.random.default_rng(3)
    z = rng.uniform(0, 1, 6)
    d = 0.8 * z + rng.normal(0, 0.3, 6)
    found = typical_slope(d.tolist(), z.tolist()).parts[0]
    assert found.estimate == pytest.approx(np.polyfit(z, d, 1)[0])
    for alternative, ours in (("greater", found.above(bound)), ("less", found.below(bound))):
        theirs = permutation_test(
            (z,),
            lambda order: float(((order - z.mean()) * (d - bound * z)).sum()),
            permutation_type="pairings",
            alternative=alternative,
            n_resamples=np.inf,
        )
        assert ours == pytest.approx(theirs.pvalue, abs=1e-12)


def test_drawn_relabellings_give_nearly_the_p_value_of_all_of_them() -> None:
    d = np.random.default_rng(1).normal(0.1, 0.3, 17)
    every = ((np.arange(1, 2**17)[:, None] >> np.arange(17)) & 1) @ np.sort(d)
    exact = (1 + int((every <= 1e-12).sum())) / 2**17
    assert len(sign_flips(17)) <= DRAWS < 2**17
    assert typical_mean(d.tolist()).above(0) == pytest.approx(exact, abs=4 * np.sqrt(exact / DRAWS))


def test_p_is_never_zero_and_few_blocks_have_no_interval() -> None:
    strong = typical_mean([1.0] * 30)
    assert 0 < strong.equal_to(0) < 0.001
    few = typical_mean([0.4, 0.5, 0.6, 0.5])
    assert few.equal_to(0) == few.smallest == 0.125
    assert few.interval(0.95) == (-np.inf, np.inf)
    assert few.interval(0.8)[0] > 0


@given(BLOCKS)
@settings(max_examples=60, deadline=None)
def test_an_interval_holds_just_what_the_test_does_not_refuse(d: list[float]) -> None:
    found = typical_mean(d)
    low, high = found.interval(0.8)
    for bound in np.linspace(-1.2, 1.2, 49):
        if abs(bound - low) > 1e-9 and abs(bound - high) > 1e-9:
            assert (found.equal_to(bound) > 0.2 + 1e-9) == (low < bound < high)


@given(BLOCKS, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_of_blocks_does_not_matter_and_a_change_of_sign_changes_the_side(d: list[float], random) -> None:
    z = [index / len(d) for index in range(len(d))]
    order = list(range(len(d)))
    random.shuffle(order)
    mixed = [d[i] for i in order]
    assert typical_mean(mixed).equal_to(0.1) == typical_mean(d).equal_to(0.1)
    assert typical_slope(mixed, [z[i] for i in order]).above(0.2) == typical_slope(d, z).above(0.2)
    turned = [-value for value in d]
    for found, opposite in (
        (typical_mean(d), typical_mean(turned)),
        (typical_slope(d, z), typical_slope(turned, z)),
    ):
        assert opposite.above(0.1) == pytest.approx(found.below(-0.1))
        assert opposite.interval(0.8) == pytest.approx(tuple(-end for end in reversed(found.interval(0.8))))


def test_the_order_of_many_blocks_does_not_matter_either() -> None:
    rng = np.random.default_rng(5)
    d, z = rng.normal(0.1, 0.3, 25), rng.uniform(0, 1, 25)
    order = rng.permutation(25)
    for one, other in (
        (typical_mean(d.tolist()), typical_mean(d[order].tolist())),
        (typical_slope(d.tolist(), z.tolist()), typical_slope(d[order].tolist(), z[order].tolist())),
    ):
        assert (one.above(0), one.interval(0.95)) == (other.above(0), pytest.approx(other.interval(0.95)))


def test_equality_asks_both_sides_and_its_opposite_too() -> None:
    found = typical_mean([0.01, -0.01, 0.005, -0.004, 0.002, 0.001, -0.003, 0.006])
    assert found.within(0.02) == max(found.above(-0.02), found.below(0.02)) == 1 / 2**8
    assert found.beyond(0.02) == 1.0
    far = typical_mean([0.3, 0.2, 0.25, 0.28, 0.31, 0.22, 0.26, 0.27])
    assert far.beyond(0.02) == 2 / 2**8 and far.within(0.02) == 1.0


@pytest.mark.parametrize("blocks", [6, 24])
def test_an_interval_of_a_mean_covers_it_nineteen_times_in_twenty(blocks: int) -> None:
    rng = np.random.default_rng(blocks)
    d = rng.normal(0.1, 0.2, (blocks, 2000))
    above, below = one_sided(sign_flips(blocks, 2000), d, 0.1)
    assert 0.935 <= float((2 * np.minimum(above, below) > 0.05).mean()) <= 0.975


FEW_ARE_SKILLED = np.resize([0.0, 0.01, 0.2, 0.14, 0.28, 0.35, 0.2, 0.61], 64) + np.linspace(-0.02, 0.02, 64)
SPREADS = {
    "same": lambda z: np.full_like(z, 0.1),
    "growing": lambda z: 0.02 + 0.3 * np.abs(z),
    "doubled above": lambda z: np.where(z > z.max() / 2, 0.2, 0.1),
    "largest in the middle": lambda z: 0.02 + 0.3 * np.exp(-(((z - 0.3) / 0.1) ** 2)),
}


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("z", [np.linspace(0, 0.6, 24), FEW_ARE_SKILLED], ids=["24 even", "64, few skilled"])
def test_an_interval_of_a_slope_covers_it_however_blocks_spread(z: np.ndarray, spread: str) -> None:
    noise = SPREADS[spread](z)[:, None] * np.random.default_rng(7).normal(size=(len(z), 2000))
    above, below = slope_sides(z, 0.3 - 0.8 * z[:, None] + noise, -0.8, 2000)
    assert float((2 * np.minimum(above, below) > 0.05).mean()) >= 0.92


def test_the_stricter_test_of_a_slope_counts_and_its_interval_holds_both() -> None:
    rng = np.random.default_rng(4)
    z = FEW_ARE_SKILLED
    d = 0.2 * z + (0.02 + 0.3 * np.abs(z)) * rng.normal(size=64)
    found = typical_slope(d.tolist(), z.tolist())
    assert len(found.parts) == 2 and found.parts[0].estimate == pytest.approx(found.parts[1].estimate)
    stricter = set()
    for bound in np.linspace(-0.6, 1.0, 33):
        for side in ("above", "below"):
            p_values = [getattr(part, side)(bound) for part in found.parts]
            stricter.add((side, int(np.argmax(p_values))))
            assert getattr(found, side)(bound) == max(p_values)
    assert stricter == {("above", 0), ("above", 1), ("below", 0), ("below", 1)}
    low, high = found.interval(0.95)
    assert all(low <= part.interval(0.95)[0] and part.interval(0.95)[1] <= high for part in found.parts)
    assert found.equal_to(low - 0.01) < 0.05 < found.equal_to((low + high) / 2)
    above, below = slope_sides(z, d[:, None], 0.1)
    assert (above[0], below[0]) == pytest.approx((found.above(0.1), found.below(0.1)), abs=2e-3)


@pytest.mark.parametrize(("blocks", "degree"), [(8, 1), (24, 1), (8, 2), (24, 2)])
def test_what_the_covariate_explains_is_taken_out_and_the_interval_still_covers(blocks: int, degree: int) -> None:
    rng = np.random.default_rng(blocks)
    z = np.linspace(0, 0.6, blocks)
    truth = 0.3 - 0.8 * z + (1.5 * (z - 0.3) ** 2 if degree == 2 else 0)
    d = truth[:, None] + rng.normal(0, 0.1, (blocks, 2000))
    adjusted = adjustment(z, degree) @ d
    assert adjustment(z, degree) @ truth == pytest.approx(truth.mean())
    assert adjusted.mean(axis=0) == pytest.approx(d.mean(axis=0))
    above, below = one_sided(sign_flips(blocks, 2000), adjusted, float(truth.mean()))
    assert 0.93 <= float((2 * np.minimum(above, below) > 0.05).mean()) <= 0.975
    assert float(adjusted.std(axis=0).mean()) < 0.75 * float(d.std(axis=0).mean())


def test_what_cannot_be_tested_is_refused() -> None:
    with pytest.raises(ValueError, match="no blocks"):
        typical_mean([])
    with pytest.raises(ValueError, match="two blocks"):
        typical_slope([0.1, 0.2], [0.5, 0.5])
    for numbers in ([0.1, np.nan, 0.2], [0.1, np.inf, 0.2]):
        with pytest.raises(ValueError, match="not finite"):
            typical_mean(numbers)
        with pytest.raises(ValueError, match="not finite"):
            typical_slope([0.1, 0.2, 0.3], numbers)


def test_many_tests_at_once_are_the_single_ones() -> None:
    d = np.random.default_rng(2).normal(0.1, 0.2, (7, 5))
    above, below = one_sided(sign_flips(7), d, 0.05)
    for column in range(5):
        single: Typical = typical_mean(d[:, column].tolist())
        assert (above[column], below[column]) == (single.above(0.05), single.below(0.05))

"""Statistics of a comparison: p-values that do not cry wolf, pairs that are pairs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.compare.comparisons import COLUMNS, make_comparison, make_run
from thence.compare.result import Arm, Comparison, Run
from thence.compare.statistics import differences, estimate_of, statistics

TEST = COLUMNS[0]


def test_effect_is_found_and_no_effect_is_not():
    found = statistics(make_comparison({"ref": 0.0, "same": 0.0, "better": 1.2, "worse": -1.2}))
    better, worse, same = (found.differences[name, "rich", TEST] for name in ("better", "worse", "same"))
    assert better.significant and better.mean > 0 and better.low > 0
    assert worse.significant and worse.mean < 0 and worse.high < 0
    assert not same.significant and same.low < 0 < same.high
    assert ("ref", "rich", TEST) not in found.differences


def test_equal_arms_are_rarely_called_different():
    """Family-wise: at most about 5% of comparisons with six arms alike name any of them."""
    alarms = 0
    for draw in range(100):
        made = make_comparison(
            {f"a{i}": 0.0 for i in range(6)}, problems=60, draw=draw, seed_sd=0.2, columns=COLUMNS[:1]
        )
        pairs = [(f"a{i}", "a0") for i in range(1, 6)]
        alarms += any(d is not None and d.significant for d in differences(made, "rich", TEST, pairs, 200))
    assert alarms <= 11


def test_correction_counts_planned_arms_though_their_runs_are_missing():
    full = make_comparison({"ref": 0.0, "better": 0.6, "absent": 0.0, "absent too": 0.0})
    part = replace(full, runs=tuple(run for run in full.runs if not run.arm.startswith("absent")))
    found = statistics(part).differences["better", "rich", TEST]
    assert found.corrected == pytest.approx(min(1.0, 3 * found.p))


def test_mean_and_spread_by_hand():
    runs = [make_run("a", "b", seed, {TEST: right}) for seed, right in enumerate(([2, 0, 1, 2], [1, 1, 0, 0]))]
    found = estimate_of(runs, TEST)
    assert found is not None
    assert found.mean == pytest.approx((5 / 8 + 2 / 8) / 2)
    assert found.std == pytest.approx(np.std([5 / 8, 2 / 8], ddof=1))
    assert (found.seeds, found.problems, found.samples, found.over) == (2, 4, 2, "problems and seeds")
    assert 0 <= found.low <= found.mean <= found.high <= 1


def test_one_seed_speaks_of_problems_only_and_is_never_significant():
    found = statistics(make_comparison({"ref": 0.0, "better": 3.0}, seeds=1))
    difference = found.differences["better", "rich", TEST]
    assert found.estimates["better", "rich", TEST].std is None
    assert difference.over == "problems" == found.estimates["ref", "rich", TEST].over
    assert difference.low > 0 and not difference.significant


def test_only_seeds_that_both_have_are_paired():
    full = make_comparison({"ref": 0.0, "other": 0.5})
    part = replace(full, runs=tuple(run for run in full.runs if (run.arm, run.seed) not in {("ref", 0), ("other", 4)}))
    difference = statistics(part).differences["other", "rich", TEST]
    kept = {(run.arm, run.seed): run.measured[0].accuracy for run in part.runs}
    assert difference.seeds == 3
    assert difference.mean == pytest.approx(np.mean([kept["other", s] - kept["ref", s] for s in (1, 2, 3)]))


def test_pairs_on_the_same_problems_are_told_apart_more_sharply():
    """Hard problems are hard for both arms, so that the difference is surer than the two scores."""
    found = statistics(make_comparison({"ref": 0.0, "other": 0.3}, problem_sd=4.0, seed_sd=0.02, seeds=8))
    difference = found.differences["other", "rich", TEST]
    estimate = found.estimates["other", "rich", TEST]
    assert difference.high - difference.low < 0.7 * (estimate.high - estimate.low)


def one_arm(*right: list[int]) -> list[Run]:
    return [make_run("a", "b", seed, {TEST: row}) for seed, row in enumerate(right)]


def test_nothing_right_is_not_certainty():
    found = estimate_of(one_arm([0] * 50, [0] * 50), TEST)
    assert found is not None and found.low == pytest.approx(0) and 0.03 < found.high < 0.15


def test_seeds_with_different_numbers_of_problems():
    found = estimate_of(one_arm([2, 1] * 30, [1, 0] * 20, [2, 0] * 25), TEST)
    assert found is not None
    assert found.mean == pytest.approx((0.75 + 0.25 + 0.5) / 3)
    assert found.low < found.mean < found.high and found.problems == 40


def test_nothing_measured_is_nothing():
    assert estimate_of([], TEST) is None
    empty = Comparison("c", "", "ref", "", ("b",), (0,), (TEST,), (Arm("ref", "Ref"), Arm("a", "A")))
    assert not statistics(empty).estimates and not statistics(empty).differences


def test_same_seed_same_numbers():
    made = make_comparison({"ref": 0.0, "a": 0.4})
    one, again, other = statistics(made, 200, 1), statistics(made, 200, 1), statistics(made, 200, 2)
    key = ("a", "rich", TEST)
    assert one.differences == again.differences and one.estimates == again.estimates
    assert one.estimates[key].mean == other.estimates[key].mean and one.estimates[key].low != other.estimates[key].low


def test_other_pairs_are_corrected_for_their_own_number():
    found = statistics(make_comparison({"ref": 0.0, "a": 0.1, "b": 1.0}))
    alone = found.pairs("rich", TEST, [("b", "a")])[0]
    both = found.pairs("rich", TEST, [("b", "a"), ("a", "ref")])[0]
    assert alone is not None and both is not None
    assert alone.mean == both.mean and alone.corrected == alone.p < both.corrected

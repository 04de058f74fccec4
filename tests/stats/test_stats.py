"""Statistics: intervals that cover the truth, honest p-values, corrections."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thence.errors import UserError
from thence.evaluate.metrics import avg_at_k, pass_at_k
from thence.stats.multiplicity import holm
from thence.stats.paired import paired
from thence.stats.proportion import mean_score, mean_share, wilson
from thence.stats.resample import spread
from thence.stats.spread import Score, mean_value, student_p, student_quantile

# Student's t.


@pytest.mark.parametrize(
    ("df", "expected"), [(1, 12.7062), (2, 4.3027), (5, 2.5706), (10, 2.2281), (30, 2.0423), (1e6, 1.95996)]
)
def test_student_quantiles_are_the_tables(df: float, expected: float) -> None:
    assert student_quantile(df) == pytest.approx(expected, abs=1e-4)
    assert student_p(expected, df) == pytest.approx(0.05, abs=1e-5)


def test_student_tail_of_one_degree_is_cauchys() -> None:
    for t in (0.1, 1.0, 3.0, 50.0):
        assert student_p(t, 1) == pytest.approx(1 - 2 * math.atan(t) / math.pi)
    assert student_p(0.0, 7) == 1.0


def test_student_tail_stays_exact_far_out() -> None:
    assert student_p(31.8205, 1) == pytest.approx(0.02, rel=1e-4)
    assert student_p(13.0337, 4) == pytest.approx(2e-4, rel=1e-3)
    assert student_quantile(10, confidence=0.9) == pytest.approx(1.8125, abs=1e-4)


def test_importing_the_statistics_imports_no_scipy() -> None:
    code = "import sys, thence.stats.paired, thence.stats.resample; sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Shares of right answers.

Z = 1.959963984540054


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(10, 10, 0.72247, 1.0), (0, 10, 0.0, 0.27753), (5, 10, 0.23659, 0.76341), (81, 263, 0.25526, 0.36618)],
)
def test_wilson_gives_the_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes / n, n, Z) == pytest.approx((low, high), abs=1e-4)


def test_wilsons_interval_begins_at_none_and_ends_at_all_to_the_last_bit() -> None:
    assert all(wilson(0, n, Z)[0] == 0 and wilson(1, n, Z)[1] == 1 for n in range(1, 300))


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=40))
def test_an_interval_holds_the_score_and_lies_between_zero_and_one(shares: list[float]) -> None:
    score = mean_share(shares, 4)
    assert 0 <= score.low <= score.value <= score.high <= 1
    assert score.high - score.low > 0.02  # forty problems are never certainty
    one = mean_share(shares[:1], 4)
    assert (one.low, one.high) == pytest.approx(wilson(shares[0], 1, Z))


def test_a_score_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no problems"):
        mean_share([], 1)
    with pytest.raises(ValueError, match="no values"):
        mean_value([], 1)


def test_thirty_wrong_problems_leave_room() -> None:
    score = avg_at_k([0] * 30, 32)
    assert (score.value, score.low, score.standard_error) == (0.0, 0.0, 0.0)
    assert 0.1 < score.high < 0.15


def test_copies_of_the_samples_do_not_narrow_the_interval_but_problems_do() -> None:
    counts = [0, 1, 2, 3, 4] * 8
    few, many = avg_at_k(counts, 4), avg_at_k([16 * right for right in counts], 64)
    assert (few.low, few.high) == pytest.approx((many.low, many.high))
    wide = avg_at_k(counts * 4, 4)
    assert few.high - few.low == pytest.approx(2 * (wide.high - wide.low), rel=0.05)


def shares(rng: np.random.Generator, mean: float, spread: float, shape: tuple[int, int]) -> np.ndarray:
    """Chances of problems to be solved: beta distributed around `mean`; a small `spread` makes them extreme."""
    return rng.beta(mean * spread, (1 - mean) * spread, shape)


@pytest.mark.parametrize(
    ("problems", "samples", "mean", "spread"),
    [(30, 32, 0.5, 1.0), (60, 4, 0.5, 1.0), (30, 4, 0.25, 2.0), (83, 32, 0.25, 1.5), (83, 1, 0.1, 2.0),
     (200, 1, 0.03, 5.0), (272, 4, 0.5, 1.0), (500, 1, 0.9, 3.0)],
)  # fmt: skip
def test_the_interval_covers_the_truth_nineteen_times_in_twenty(
    problems: int, samples: int, mean: float, spread: float
) -> None:
    rng = np.random.default_rng(problems + samples)
    counts = rng.binomial(samples, shares(rng, mean, spread, (2000, problems)))
    scores = [avg_at_k(row, samples) for row in counts.tolist()]
    assert 0.93 <= statistics.mean(score.low <= mean <= score.high for score in scores) <= 0.97


def test_the_interval_of_pass_at_k_covers_too() -> None:
    rng = np.random.default_rng(5)
    chances = shares(rng, 0.3, 2.0, (2000, 83))
    truth = 1 - float(np.mean((1 - shares(rng, 0.3, 2.0, (1000, 1000))) ** 4))
    scores = [pass_at_k(row, 16, 4) for row in rng.binomial(16, chances).tolist()]
    assert 0.93 <= statistics.mean(score.low <= truth <= score.high for score in scores) <= 0.97


def test_the_mean_of_tasks_covers_though_one_task_is_always_wrong() -> None:
    rng = np.random.default_rng(6)
    truth = (0.3 + 0.7 + 0.001) / 3
    hits = []
    for _ in range(2000):
        tasks = [
            avg_at_k(rng.binomial(8, shares(rng, 0.3, 2.0, (1, 30))[0]).tolist(), 8),
            avg_at_k(rng.binomial(1, np.full(200, 0.7)).tolist(), 1),
            avg_at_k(rng.binomial(1, np.full(30, 0.001)).tolist(), 1),
        ]
        score = mean_score(tasks)
        hits.append(score.low <= truth <= score.high)
    assert 0.93 <= statistics.mean(hits) <= 0.985


def test_the_mean_of_tasks_weighs_them_alike() -> None:
    small, large = avg_at_k([1] * 3, 1), avg_at_k([0, 1] * 250, 1)
    mean = mean_score([small, large])
    assert mean.value == pytest.approx(0.75)
    assert (mean.problems, mean.samples) == (503, 1)
    one = Score(0.5, 0.1, 0.4, 0.6, 10, 2)
    assert mean_score([one]) == Score(0.5, 0.1, pytest.approx(0.4), pytest.approx(0.6), 10, 2)


# Two models.


def test_paired_compares_problem_by_problem() -> None:
    found = paired({"a": 1.0, "b": 0.5, "c": 0.5}, {"c": 0.0, "b": 0.5, "a": 0.25})
    differences = [0.75, 0.0, 0.5]
    error = statistics.stdev(differences) / math.sqrt(3)
    assert found.difference == pytest.approx(statistics.mean(differences))
    assert found.low == pytest.approx(found.difference - 4.30265 * error, abs=1e-4)
    assert found.p_value == pytest.approx(student_p(found.difference / error, 2))
    assert found.problems == 3


def test_pairing_sees_a_small_difference_that_two_intervals_hide() -> None:
    easy = {str(i): float(i % 2) for i in range(200)}
    better = {key: min(1.0, share + 0.1) for key, share in easy.items()}
    found = paired(better, easy)
    assert found.low > 0.04 and found.p_value < 1e-6
    a, b = avg_at_k([round(10 * s) for s in better.values()], 10), avg_at_k([round(10 * s) for s in easy.values()], 10)
    assert b.high > a.low


def test_no_difference_at_all_is_not_certainty() -> None:
    same = {str(i): 1.0 for i in range(50)}
    found = paired(same, same)
    assert (found.difference, found.p_value) == (0.0, 1.0)
    assert found.low == pytest.approx(-found.high) and 0.02 < found.high < 0.1
    opposite = paired(same, dict.fromkeys(same, 0.0))
    assert opposite.difference == opposite.high == 1.0 and 0.8 < opposite.low < 1 and opposite.p_value < 1e-9


def test_different_problems_are_refused() -> None:
    with pytest.raises(UserError, match="1 of the first and 2 of the second"):
        paired({"a": 1.0, "b": 0.0}, {"b": 1.0, "c": 0.0, "d": 0.0})
    with pytest.raises(UserError, match="no problem"):
        paired({}, {})


@settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=2), st.tuples(st.sampled_from([0, 0.5, 1]), st.sampled_from([0, 0.5, 1]))))
def test_swapping_the_models_changes_the_sign_alone(found: dict[str, tuple[float, float]]) -> None:
    if not found:
        return
    a, b = ({key: pair[i] for key, pair in found.items()} for i in range(2))
    there, back = paired(a, b), paired(b, a)
    assert (there.difference, there.low, there.high) == pytest.approx((-back.difference, -back.high, -back.low))
    assert there.p_value == pytest.approx(back.p_value)
    assert -1 <= there.low <= there.difference <= there.high <= 1


@pytest.mark.parametrize(("problems", "samples"), [(30, 32), (83, 4), (150, 1)])
def test_paired_intervals_cover_and_p_values_are_honest(problems: int, samples: int) -> None:
    rng = np.random.default_rng(problems)
    chances = shares(rng, 0.5, 1.5, (1500, problems))
    weaker = chances**1.4
    truth = 0.5 - float(np.mean(shares(rng, 0.5, 1.5, (2000, 1000)) ** 1.4))
    names = [str(i) for i in range(problems)]

    def share(chance: np.ndarray) -> list[dict[str, float]]:
        drawn = (rng.binomial(samples, chance) / samples).tolist()
        return [dict(zip(names, row, strict=True)) for row in drawn]

    pairs = [paired(a, b) for a, b in zip(share(chances), share(weaker), strict=True)]
    assert 0.93 <= statistics.mean(pair.low <= truth <= pair.high for pair in pairs) <= 0.97
    equal = [paired(a, b) for a, b in zip(share(chances), share(chances), strict=True)]
    assert 0.03 <= statistics.mean(pair.p_value < 0.05 for pair in equal) <= 0.07


# A mean over seeds and problems.


def logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def coverage(seeds: int, seed_sd: float, shared: bool, paired: bool, times: int) -> float:
    """Share of made-up comparisons whose 95% interval holds the true mean, in per cent."""
    rng = np.random.default_rng([seeds, int(10 * seed_sd), shared, paired])
    first, second, hard, own = -0.3, -0.6, 1.5, 0.3
    many = rng.normal(0, np.sqrt(seed_sd**2 + hard**2 + own**2), 400_000)
    true = logistic(first + many).mean() - (logistic(second + many).mean() if paired else 0)

    def run(level: float, problems: np.ndarray) -> np.ndarray:
        luck = rng.normal(0, seed_sd, (seeds, 1)) + rng.normal(0, own, (seeds, 128))
        return rng.binomial(2, logistic(level + luck + problems)) / 2

    held = 0
    for _ in range(times):
        problems = rng.normal(0, hard, (1 if shared else seeds, 128))
        scores = run(first, problems) - (run(second, problems) if paired else 0)
        found = spread(list(scores), replicates=200, seed=0)
        held += found.low <= true <= found.high
    return 100 * held / times


@pytest.mark.parametrize("paired", [False, True], ids=["mean", "difference"])
@pytest.mark.parametrize("shared", [False, True], ids=["own problems", "shared problems"])
@pytest.mark.parametrize("seed_sd", [0.0, 0.3])
def test_interval_of_five_seeds_covers_what_it_says(seed_sd, shared, paired):
    assert 92 <= coverage(5, seed_sd, shared, paired, times=500) <= 98


@pytest.mark.parametrize("seeds", [2, 3])
def test_interval_of_very_few_seeds_is_wide_enough(seeds):
    assert coverage(seeds, 0.3, shared=True, paired=True, times=500) >= 92


def test_percentiles_alone_would_be_too_narrow():
    """Why the width is corrected: the honest interval of five differing seeds is clearly wider than the draws'."""
    rng = np.random.default_rng(0)
    levels = [0.3, 0.4, 0.5, 0.6, 0.7]
    rows = [(rng.random(1000) < level).astype(float) for level in levels]
    found = spread(rows, 1000, 0)
    of_seeds = np.quantile(rng.choice(levels, (4000, 5)).mean(axis=1), (0.025, 0.975))
    assert found.high - found.low > 1.3 * (of_seeds[1] - of_seeds[0])


# Many tests.


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.01], tests=10) == pytest.approx([0.1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_never_helps_and_keeps_the_order(p_values):
    corrected = holm(p_values)
    assert all(p <= c <= 1 for p, c in zip(p_values, corrected, strict=True))
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert [corrected[i] for i in order] == sorted(corrected)

"""avg@k, pass@k, maj@k, their intervals, and paired comparison."""

from __future__ import annotations

import itertools
import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thence.errors import UserError
from thence.evaluate.metrics import Score, avg_at_k, maj_at_k, mean_score, paired, pass_at_k
from thence.evaluate.student import quantile, two_sided
from thence.verify.boxed import normal_form

# Values against brute force.


@st.composite
def outcomes(draw: st.DrawFn) -> list[list[bool]]:
    """Some problems with the same number of samples each, right or not."""
    samples = draw(st.integers(1, 6))
    return draw(st.lists(st.lists(st.booleans(), min_size=samples, max_size=samples), min_size=1, max_size=6))


@given(outcomes())
def test_avg_at_k_is_the_mean_over_problems_of_the_share_that_is_right(found: list[list[bool]]) -> None:
    samples = len(found[0])
    score = avg_at_k([sum(row) for row in found], samples)
    assert score.value == pytest.approx(statistics.mean(statistics.mean(row) for row in found))
    assert (score.problems, score.samples) == (len(found), samples)


@given(outcomes(), st.data())
def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples(found: list[list[bool]], data: st.DataObject) -> None:
    samples = len(found[0])
    k = data.draw(st.integers(1, samples))
    expected = [
        statistics.mean(any(row[i] for i in chosen) for chosen in itertools.combinations(range(samples), k))
        for row in found
    ]
    score = pass_at_k([sum(row) for row in found], samples, k)
    assert score.value == pytest.approx(statistics.mean(expected))
    if k == 1:
        assert score == avg_at_k([sum(row) for row in found], samples)


ANSWERS = st.sampled_from(["1", "2", "3", None])


@st.composite
def votes(draw: st.DrawFn) -> list[list[tuple[str | None, bool]]]:
    samples = draw(st.integers(1, 6))
    gold = draw(st.sampled_from(["1", "2"]))
    rows = draw(st.lists(st.lists(ANSWERS, min_size=samples, max_size=samples), min_size=1, max_size=4))
    return [[(answer, answer == gold) for answer in row] for row in rows]


def majority_by_hand(row: list[tuple[str | None, bool]], k: int) -> Fraction:
    """Every choice of k samples; of the most frequent answers each wins with the same chance."""
    chosen = list(itertools.combinations(row, k))
    total = Fraction(0)
    for some in chosen:
        cast = [answer for answer, _ in some if answer is not None]
        if cast:
            most = max(map(cast.count, cast))
            winners = {answer for answer in cast if cast.count(answer) == most}
            right = {answer for answer, is_right in some if is_right}
            total += Fraction(len(winners & right), len(winners))
    return total / len(chosen)


@given(votes(), st.data())
def test_maj_at_k_is_the_mean_over_all_choices_and_fair_draws(
    found: list[list[tuple[str | None, bool]]], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(found[0])))
    expected = statistics.mean(float(majority_by_hand(row, k)) for row in found)
    assert maj_at_k(found, k).value == pytest.approx(expected)


def test_maj_at_one_is_avg_and_ties_are_shared() -> None:
    row: list[tuple[str | None, bool]] = [("4", True), ("4", True), ("5", False), ("6", False)]
    assert maj_at_k([row], 1).value == avg_at_k([2], 4).value == 0.5
    assert maj_at_k([row], 4).value == 1.0
    assert maj_at_k([[("4", True), ("5", False)]], 2).value == 0.5
    assert maj_at_k([[(None, False), (None, False), ("4", True)]], 3).value == 1.0  # silence is no vote
    assert maj_at_k([[(None, False), (None, False)]], 2).value == 0.0


def test_answers_written_in_two_ways_vote_together() -> None:
    row: list[tuple[str | None, bool]] = [(r"\dfrac12", True), (r"\frac{1}{2}", True), ("7", False), ("8", False)]
    assert maj_at_k([row], 4).value == 1.0


def test_maj_at_k_of_many_different_answers_takes_no_time() -> None:
    rows: list[list[tuple[str | None, bool]]] = [[(str(i // 2), i < 2) for i in range(64)] for _ in range(3)]
    assert 0 < maj_at_k(rows, 32).value < 0.2


def test_pass_at_k_of_many_samples_is_exact() -> None:
    # 1 - C(9000, 500) / C(10000, 500) has numbers of a thousand digits
    exact = 1 - Fraction(math.comb(9999, 500), math.comb(10000, 500))
    assert pass_at_k([1], 10_000, 500).value == pytest.approx(float(exact))


def test_scores_of_nothing_and_impossible_k_are_refused() -> None:
    with pytest.raises(ValueError, match="no problems"):
        avg_at_k([], 4)
    with pytest.raises(ValueError, match="between 0 and 4"):
        avg_at_k([5], 4)
    with pytest.raises(ValueError, match="k = 5 of 4"):
        pass_at_k([1], 4, 5)
    with pytest.raises(ValueError, match="different numbers"):
        maj_at_k([[("1", True)], []], 1)


# Intervals.


@pytest.mark.parametrize(
    ("df", "expected"), [(1, 12.7062), (2, 4.3027), (5, 2.5706), (10, 2.2281), (30, 2.0423), (1e6, 1.95996)]
)
def test_student_quantiles_are_the_tables(df: float, expected: float) -> None:
    assert quantile(0.95, df) == pytest.approx(expected, abs=1e-4)
    assert two_sided(expected, df) == pytest.approx(0.05, abs=1e-5)


def test_student_tail_of_one_degree_is_cauchys() -> None:
    for t in (0.1, 1.0, 3.0, 50.0):
        assert two_sided(t, 1) == pytest.approx(1 - 2 * math.atan(t) / math.pi)
    assert two_sided(0.0, 7) == 1.0


@given(outcomes())
def test_an_interval_holds_the_score_and_lies_between_zero_and_one(found: list[list[bool]]) -> None:
    score = avg_at_k([sum(row) for row in found], len(found[0]))
    assert 0 <= score.low <= score.value <= score.high <= 1
    assert score.high - score.low > 0.02  # six problems are never certainty


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
    [(30, 32, 0.5, 1.0), (30, 4, 0.25, 2.0), (83, 32, 0.25, 1.5), (83, 1, 0.1, 2.0), (200, 1, 0.03, 5.0),
     (272, 4, 0.5, 1.0), (500, 1, 0.9, 3.0)],
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
    assert found.p_value == pytest.approx(two_sided(found.difference / error, 2))
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


# What counts as the same answer.


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\dfrac{1}{2}", r"\frac12"),
        ("1/2", r"\tfrac{1}{2}"),
        ("-3/4", r"-\frac{3}{4}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"90^\circ", "90"),
        (r"\text{east}", "east"),
        (r"\$1.50", "1.50"),
        (".5", "0.5"),
        (r"\sqrt3", r"\sqrt{3}"),
        ("42.", "42"),
    ],
)
def test_normal_form_joins_what_is_written_differently(one: str, other: str) -> None:
    assert normal_form(one) == normal_form(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1/2", "2/1"),
        ("12", "1"),
        (r"\rightarrow", r"\leftarrow"),
        ("-3", "3"),
        (r"\text{east}", r"\text{west}"),
        (r"5\text{ cm}", "5"),
        (r"12\%", "12"),
    ],
)
def test_normal_form_keeps_different_answers_apart(one: str, other: str) -> None:
    assert normal_form(one) != normal_form(other)

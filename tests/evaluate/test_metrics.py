"""avg@k, pass@k, maj@k, and which answers vote together."""

from __future__ import annotations

import itertools
import math
import statistics
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thence.evaluate.metrics import avg_at_k, maj_at_k, pass_at_k
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

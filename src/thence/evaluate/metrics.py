"""The numbers of an evaluation: avg@k, pass@k, maj@k and the mean reward, with the intervals of :mod:`thence.stats`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from thence.stats.proportion import mean_share
from thence.stats.spread import Score, mean_value
from thence.verify.boxed import normal_form


def avg_at_k(right_per_problem: Sequence[int], samples: int) -> Score:
    """avg@k: the mean over problems of the share of right samples, k = `samples`.

    Args:
        right_per_problem: how many of a problem's samples are right.
        samples: how many it has.
    """
    _check_counts(right_per_problem, samples)
    return mean_share([right / samples for right in right_per_problem], samples)


def pass_at_k(right_per_problem: Sequence[int], samples: int, k: int) -> Score:
    """pass@k: the chance that at least one of k samples is right, by the unbiased estimator 1 - C(n-c, k) / C(n, k).

    M. Chen et al., Evaluating Large Language Models Trained on Code (2021), equation 1; n = `samples`, c right ones.

    Raises:
        ValueError: k is not in 1..samples.
    """
    _check_counts(right_per_problem, samples)
    _check_k(k, samples)
    return mean_share([_pass(right, samples, k) for right in right_per_problem], samples)


def maj_at_k(answers_per_problem: Sequence[Sequence[tuple[str | None, bool]]], k: int) -> Score:
    """maj@k: the chance that the most frequent answer of k samples is right.

    It is the exact expectation over every choice of k of a problem's n samples and over fair draws between answers
    that are equally frequent. Samples without an answer (None) do not vote; if none of the k votes, the result is
    wrong. Answers count as the same when their normal forms are (`thence.verify.boxed.normal_form`): the gold answer
    has no part in that, as it would have none in a real vote. A winning answer counts as right by the share of its
    samples that are right.

    Args:
        answers_per_problem: (extracted answer, right?) of every sample; as many for every problem.
        k: 1 to the number of samples.

    Raises:
        ValueError: the problems have different numbers of samples, or there are fewer than k.
    """
    samples = len(answers_per_problem[0]) if answers_per_problem else 0
    if any(len(answers) != samples for answers in answers_per_problem):
        raise ValueError("problems have different numbers of samples")
    _check_counts([0] * len(answers_per_problem), samples)
    _check_k(k, samples)
    return mean_share([_majority(answers, k) for answers in answers_per_problem], samples)


def mean_reward_of(scores_per_problem: Sequence[Sequence[float]], samples: int) -> Score:
    """The mean over problems of the mean score of their responses, on any scale, with Student's t interval.

    The interval of one problem is the whole line: it tells nothing about others.

    Args:
        scores_per_problem: scores of the responses that have one; a problem without any is left out.
        samples: how many responses a problem has.
    """
    return mean_value([math.fsum(scores) / len(scores) for scores in scores_per_problem if scores], samples)


def _pass(right: int, samples: int, k: int) -> float:
    if k == 1:  # exactly avg@k: the product below would differ in the last digit
        return right / samples
    if samples - right < k:
        return 1.0
    # 1 - C(n-c, k) / C(n, k) as a product: no large numbers
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - right + 1, samples + 1))


def _majority(answers: Sequence[tuple[str | None, bool]], k: int) -> float:
    """The expectation that `maj_at_k` describes, for one problem."""
    votes: Counter[str] = Counter()
    rights: Counter[str] = Counter()
    for answer, right in answers:
        if answer is not None:
            votes[normal_form(answer)] += 1
            rights[normal_form(answer)] += right
    silent = len(answers) - votes.total()
    chances: dict[int, Fraction] = {}  # answers with equally many votes have equal chances
    total = Fraction(0)
    for answer, count in votes.items():
        if rights[answer]:
            if count not in chances:
                others = list((votes - Counter({answer: count})).values())
                chances[count] = _wins(count, others, silent, len(answers), k)
            total += chances[count] * Fraction(rights[answer], count)
    return float(total)


def _wins(count: int, others: Sequence[int], silent: int, samples: int, k: int) -> Fraction:
    """The chance that an answer with `count` votes wins among k of the samples, draws shared fairly."""
    won = Fraction(0)
    for top in range(1, min(count, k) + 1):
        # ways[ties][chosen]: choices from the other samples in which nobody is above `top` and `ties` answers reach it
        ways = [[math.comb(silent, chosen) for chosen in range(k - top + 1)]]
        for other in others:
            ways = _with_answer(ways, other, top)
        own = math.comb(count, top)
        won += sum((Fraction(own * row[k - top], 1 + ties) for ties, row in enumerate(ways)), Fraction(0))
    return won / math.comb(samples, k)


def _with_answer(ways: list[list[int]], votes: int, top: int) -> list[list[int]]:
    size = len(ways[0])
    grown = [[0] * size for _ in range(len(ways) + (top <= votes))]
    for taken in range(min(votes, top, size - 1) + 1):
        factor = math.comb(votes, taken)
        for ties, row in enumerate(ways):
            into = grown[ties + (taken == top)]
            for chosen in range(size - taken):
                into[chosen + taken] += factor * row[chosen]
    return grown


def _check_counts(right_per_problem: Sequence[int], samples: int) -> None:
    if not right_per_problem:
        raise ValueError("a score of no problems")
    if samples < 1 or not all(0 <= right <= samples for right in right_per_problem):
        raise ValueError(f"counts of right samples have to lie between 0 and {samples}")


def _check_k(k: int, samples: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(f"k = {k} of {samples} samples")

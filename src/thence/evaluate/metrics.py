"""The numbers of an evaluation: avg@k, pass@k, maj@k with intervals clustered by problem, and paired differences.

Samples of one problem are not independent, so the problem is the unit everywhere: a task has one share in [0, 1] for
each problem, its score is their mean, and the standard error comes from their spread. Intervals are for other problems
of the same kind, not for other samples of these problems.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from thence.errors import UserError
from thence.evaluate.student import quantile, two_sided
from thence.verify.boxed import normal_form

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """A score in [0, 1] with its uncertainty.

    Args:
        value: mean over problems.
        standard_error: standard deviation of the problems' shares over the root of their number; 0 for one problem, and
            where all shares are alike.
        low, high: 95% interval.
        problems: number of problems.
        samples: responses for each problem.
    """

    value: float
    standard_error: float
    low: float
    high: float
    problems: int
    samples: int


@dataclass(frozen=True)
class Paired:
    """The difference of two models on the same problems.

    Args:
        difference: mean over problems of share A minus share B, in [-1, 1].
        low, high: 95% interval.
        p_value: two-sided, of no difference.
        problems: number of problems.
    """

    difference: float
    low: float
    high: float
    p_value: float
    problems: int


def avg_at_k(right_per_problem: Sequence[int], samples: int) -> Score:
    """avg@k: the mean over problems of the share of right samples, k = `samples`.

    Args:
        right_per_problem: how many of a problem's samples are right.
        samples: how many it has.
    """
    _check_counts(right_per_problem, samples)
    return _score([right / samples for right in right_per_problem], samples)


def pass_at_k(right_per_problem: Sequence[int], samples: int, k: int) -> Score:
    """pass@k: the chance that at least one of k samples is right, by the unbiased estimator 1 - C(n-c, k) / C(n, k).

    M. Chen et al., Evaluating Large Language Models Trained on Code (2021), equation 1; n = `samples`, c right ones.

    Raises:
        ValueError: k is not in 1..samples.
    """
    _check_counts(right_per_problem, samples)
    _check_k(k, samples)
    return _score([_pass(right, samples, k) for right in right_per_problem], samples)


def maj_at_k(answers_per_problem: Sequence[Sequence[tuple[str | None, bool]]], k: int) -> Score:
    """maj@k: the chance that the most frequent answer of k samples is right.

    It is the exact expectation over every choice of k of a problem's n samples and over fair draws between answers
    that are equally frequent. Samples without an answer (None) do not vote; if none of the k votes, the result is
    wrong. Answers count as the same when their normal forms are (`thence.verify.boxed.normal_form`): the gold answer
    has no part in that, as it would have none in a real vote. An answer that won is right to the share of its own
    samples that are.

    Args:
        answers_per_problem: (extracted answer, right?) of every sample; as many for every problem.
        k: 1 to the number of samples.
    """
    samples = len(answers_per_problem[0]) if answers_per_problem else 0
    if any(len(answers) != samples for answers in answers_per_problem):
        raise ValueError("problems have different numbers of samples")
    _check_counts([0] * len(answers_per_problem), samples)
    _check_k(k, samples)
    return _score([_majority(answers, k) for answers in answers_per_problem], samples)


def mean_score(scores: Sequence[Score]) -> Score:
    """The unweighted mean of several tasks' scores, with an interval.

    The interval joins the tasks' own intervals (G. Zou and A. Donner, Construction of confidence limits about effect
    measures, 2008): distances of the ends from the values add up in squares, as those of independent estimates do. It
    stays honest where a task has only right or only wrong answers and so a standard error of zero. `problems` is the
    sum; `samples` is the tasks' number where they agree, else 0.
    """
    if not scores:
        raise ValueError("the mean of no scores")
    n, samples = len(scores), {score.samples for score in scores}
    value = sum(score.value for score in scores) / n
    return Score(
        value=value,
        standard_error=math.sqrt(sum(score.standard_error**2 for score in scores)) / n,
        low=max(0.0, value - math.sqrt(sum((score.value - score.low) ** 2 for score in scores)) / n),
        high=min(1.0, value + math.sqrt(sum((score.high - score.value) ** 2 for score in scores)) / n),
        problems=sum(score.problems for score in scores),
        samples=samples.pop() if len(samples) == 1 else 0,
    )


def mean_reward_of(scores_per_problem: Sequence[Sequence[float]], samples: int) -> Score:
    """The mean over problems of the mean score of their responses, on any scale, with Student's t interval.

    The interval of one problem is the whole line: it tells nothing about others.

    Args:
        scores_per_problem: scores of the responses that have one; a problem without any is left out.
        samples: how many responses a problem has.
    """
    means = [math.fsum(scores) / len(scores) for scores in scores_per_problem if scores]
    if not means:
        raise ValueError("a mean of no rewards")
    mean, error = _mean_and_error(means)
    half = quantile(CONFIDENCE, len(means) - 1) * error if len(means) > 1 else math.inf
    return Score(mean, error, mean - half, mean + half, len(means), samples)


def paired(right_a: Mapping[str, float], right_b: Mapping[str, float]) -> Paired:
    """Compare two models on the same problems: share of right samples by problem key, A minus B.

    Student's t on the differences. Where all differences are the same number, the interval makes room for a share of
    problems that would differ and has not been seen (the end of a score interval for none in n), and the p value is
    that of the sign test.

    Raises:
        UserError: the problems are not the same, or there are none.
    """
    if set(right_a) != set(right_b):
        only_a, only_b = len(set(right_a) - set(right_b)), len(set(right_b) - set(right_a))
        raise UserError(
            f"the two models answered different problems: {only_a} of the first and {only_b} of the second alone",
            remedy="compare evaluations of the same task, data and --limit",
        )
    if not right_a:
        raise UserError("there is no problem to compare on", remedy="compare evaluations that have graded samples")
    differences = [right_a[key] - right_b[key] for key in right_a]
    n = len(differences)
    mean, error = _mean_and_error(differences)
    if n == 1:
        return Paired(mean, -1.0, 1.0, 1.0, n)
    if error == 0.0:
        unseen = _score_interval(0.0, n, quantile(CONFIDENCE, n - 1))[1]
        p = 1.0 if mean == 0 else min(1.0, 2 * 0.5**n)
        return Paired(mean, mean - unseen * (1 + mean), mean + unseen * (1 - mean), p, n)
    half = quantile(CONFIDENCE, n - 1) * error
    low, high = max(-1.0, mean - half), min(1.0, mean + half)
    return Paired(mean, low, high, two_sided(mean / error, n - 1), n)


def _score(shares: Sequence[float], samples: int) -> Score:
    """The mean of shares in [0, 1] with a score interval on the effective number of independent yes-or-no problems.

    E. B. Wilson's interval (1927) with n = p (1-p) / standard error^2 in place of the number of problems, and Student's
    t in place of the normal quantile, as E. Korn and B. Graubard (1998) advise for clustered samples. Against the plain
    mean +- t * error it keeps its coverage for few problems and for scores near 0 or 1, and stays inside [0, 1].
    """
    n = len(shares)
    mean, error = _mean_and_error(shares)
    # One problem tells nothing about others: Wilson's interval with the normal quantile is wide enough to say so.
    t = quantile(CONFIDENCE, n - 1) if n > 1 else quantile(CONFIDENCE, 1e6)
    effective = mean * (1 - mean) / error**2 if error > 0 else n
    low, high = _score_interval(mean, effective, t)
    return Score(mean, error, low, high, n, samples)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    n = len(values)
    mean = math.fsum(values) / n
    if all(value == values[0] for value in values):
        return values[0], 0.0
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def _score_interval(p: float, n: float, z: float) -> tuple[float, float]:
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))


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

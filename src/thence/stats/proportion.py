"""Intervals of proportions: of shares of right answers, one a problem, and of means over tasks.

The samples of a problem are not independent, so the problem is the unit: the standard error comes from the spread of
the problems' shares. Intervals speak of other problems of the same kind, not of other samples of these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from thence.stats.spread import CONFIDENCE, Score, mean_and_error, student_quantile


def mean_share(shares: Sequence[float], samples: int) -> Score:
    """The mean of shares in [0, 1] with a score interval on the effective number of independent yes-or-no problems.

    E. B. Wilson's interval (1927) with n = p (1-p) / standard error^2 in place of the number of problems, and Student's
    t in place of the normal quantile, as E. Korn and B. Graubard (1998) advise for clustered samples. Against the plain
    mean +- t * error it keeps its coverage for few problems and for scores near 0 or 1, and stays inside [0, 1].

    Args:
        shares: the share of right samples of each problem.
        samples: how many responses a problem has.

    Raises:
        ValueError: no shares.
    """
    n = len(shares)
    if not n:
        raise ValueError("a score of no problems")
    mean, error = mean_and_error(shares)
    # One problem tells nothing about others: Wilson's interval with the normal quantile is wide enough to say so.
    z = student_quantile(n - 1) if n > 1 else NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    effective = mean * (1 - mean) / error**2 if error > 0 else n
    low, high = wilson(mean, effective, z)
    return Score(mean, error, low, high, n, samples)


def wilson(p: float, n: float, z: float) -> tuple[float, float]:
    """Wilson's score interval of a proportion ``p`` of ``n``. It contains ``p`` under any rounding."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))


def mean_score(scores: Sequence[Score]) -> Score:
    """The unweighted mean of several tasks' scores, with an interval.

    The interval joins the tasks' own intervals, see :func:`joined`. It stays honest where a task has only right or only
    wrong answers and so a standard error of zero. `problems` is the sum; `samples` is the tasks' number where they
    agree, else 0.

    Raises:
        ValueError: no scores.
    """
    if not scores:
        raise ValueError("the mean of no scores")
    samples = {score.samples for score in scores}
    value, low, high = joined([(score.value, score.low, score.high) for score in scores], 0.0)
    return Score(
        value=value,
        standard_error=math.hypot(*(score.standard_error for score in scores)) / len(scores),
        low=low,
        high=high,
        problems=sum(score.problems for score in scores),
        samples=samples.pop() if len(samples) == 1 else 0,
    )


def joined(estimates: Sequence[tuple[float, float, float]], least: float) -> tuple[float, float, float]:
    """The mean of independent estimates, (value, low, high) each, with an interval within [``least``, 1].

    Distances of the ends from the values add up in squares (G. Zou and A. Donner, Construction of confidence limits
    about effect measures, 2008).
    """
    n = len(estimates)
    value = math.fsum(value for value, _, _ in estimates) / n
    down = math.hypot(*(value - low for value, low, _ in estimates)) / n
    up = math.hypot(*(high - value for value, _, high in estimates)) / n
    return value, max(least, value - down), min(1.0, value + up)

"""Accuracy over problems with several samples each, and its 95% interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from thence.evaluate.student import quantile

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Accuracy:
    """avg@k with its uncertainty.

    Args:
        accuracy: mean over problems of the share of right samples.
        low: lower end of the 95% interval.
        high: upper end.
        problems: number of problems.
    """

    accuracy: float
    low: float
    high: float
    problems: int


def accuracy(share_per_problem: Sequence[float]) -> Accuracy:
    """avg@k with a 95% interval clustered by problem.

    The samples of a problem are not independent, so the problem is the unit: standard error = standard deviation of
    the problems' shares over the root of their number. Where every problem has the same share the normal interval
    has no width, and Wilson's interval on the number of problems is used instead.

    Args:
        share_per_problem: the share of right samples of each problem, in [0, 1].
    """
    n = len(share_per_problem)
    if n == 0:
        raise ValueError("accuracy of no problems")
    mean = sum(share_per_problem) / n
    variance = sum((share - mean) ** 2 for share in share_per_problem) / max(1, n - 1)
    if variance == 0:
        low, high = wilson(mean * n, n)
    else:
        half = Z95 * math.sqrt(variance / n)
        low, high = max(0.0, mean - half), min(1.0, mean + half)
    return Accuracy(mean, low, high, n)


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion (E. B. Wilson, 1927). It holds the proportion itself, rounding or not."""
    p, z2 = successes / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


@dataclass(frozen=True)
class MeanReward:
    """A mean reward with its uncertainty.

    Args:
        mean: mean over problems of the mean score of their responses.
        low, high: 95% interval; None for one problem, which tells nothing of others.
    """

    mean: float
    low: float | None
    high: float | None


def mean_reward(mean_per_problem: Sequence[float]) -> MeanReward | None:
    """The mean of rewards with a 95% interval clustered by problem, by Student's t; None of no problems.

    Args:
        mean_per_problem: mean score of each problem's responses, on any scale.
    """
    n = len(mean_per_problem)
    if n == 0:
        return None
    mean = math.fsum(mean_per_problem) / n
    if n == 1:
        return MeanReward(mean, None, None)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in mean_per_problem) / (n - 1) / n)
    half = quantile(0.95, n - 1) * error
    return MeanReward(mean, mean - half, mean + half)

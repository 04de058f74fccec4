"""Student's t, and the interval of a mean of independent values, such as the scores of problems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """A mean over problems with its uncertainty.

    Args:
        value: mean over problems; a share in [0, 1], or a reward on any scale.
        standard_error: standard deviation of the problems' values over the root of their number; 0 for one problem, and
            where all values are alike.
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


@lru_cache(maxsize=4096)
def student_quantile(df: float, confidence: float = CONFIDENCE) -> float:
    """The t with ``confidence`` of Student's distribution between -t and t: 2.228 for 10 degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(df, (1 + confidence) / 2))


def student_p(t: float, df: float) -> float:
    """The probability that Student's t with ``df`` degrees of freedom is at least |t| away from 0."""
    from scipy.special import stdtr

    return float(2 * stdtr(df, -abs(t)))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, which is exactly 0 for one value and for values that are all alike."""
    n = len(values)
    if all(value == values[0] for value in values):
        return values[0], 0.0
    mean = math.fsum(values) / n
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def mean_value(values: Sequence[float], samples: int) -> Score:
    """The mean of values on any scale, with Student's t interval. One value tells nothing: the whole line.

    Args:
        values: one a problem.
        samples: how many responses a problem has.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("a mean of no values")
    mean, error = mean_and_error(values)
    half = student_quantile(len(values) - 1) * error if len(values) > 1 else math.inf
    return Score(mean, error, mean - half, mean + half, len(values), samples)

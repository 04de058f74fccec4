"""Two models on the same problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thence.errors import UserError
from thence.stats.proportion import wilson
from thence.stats.spread import mean_and_error, student_p, student_quantile


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


def paired(right_a: Mapping[str, float], right_b: Mapping[str, float]) -> Paired:
    """Compare two models on the same problems: share of right samples by problem key, A minus B.

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
    return paired_differences([right_a[key] - right_b[key] for key in right_a])


def paired_differences(differences: Sequence[float]) -> Paired:
    """Student's t on the differences of shares, one a problem and at least one.

    Where all differences are the same number, the interval makes room for a share of problems that would differ and has
    not been seen (the end of a score interval for none in n), and the p value is that of the sign test.
    """
    n = len(differences)
    mean, error = mean_and_error(differences)
    if n == 1:
        return Paired(mean, -1.0, 1.0, 1.0, n)
    t = student_quantile(n - 1)
    if error == 0.0:
        unseen = wilson(0.0, n, t)[1]
        p = 1.0 if mean == 0 else min(1.0, 2 * 0.5**n)
        return Paired(mean, mean - unseen * (1 + mean), mean + unseen * (1 - mean), p, n)
    low, high = max(-1.0, mean - t * error), min(1.0, mean + t * error)
    return Paired(mean, low, high, student_p(mean / error, n - 1), n)

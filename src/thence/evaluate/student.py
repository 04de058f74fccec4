"""Student's t distribution, of which the standard library has none: tail probability and quantile."""

from __future__ import annotations

import math
from functools import cache

STEPS = 200
TINY = 1e-300


def two_sided(t: float, df: float) -> float:
    """The probability that Student's t with `df` degrees of freedom is at least |t| away from 0."""
    if math.isinf(t):
        return 0.0
    return _beta(df / (df + t * t), df / 2, 0.5)


@cache
def quantile(confidence: float, df: float) -> float:
    """The t that lies beyond `confidence` of the distribution on both sides together: quantile(0.95, 10) = 2.228."""
    low, high = 0.0, 1.0
    while two_sided(high, df) > 1 - confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, df) > 1 - confidence else (low, middle)
    return (low + high) / 2


def _beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b) (NIST DLMF 8.17.20 and 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1 - _beta(1 - x, b, a)
    scale = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    return scale * _fraction(x, a, b) / a


def _fraction(x: float, a: float, b: float) -> float:
    """The continued fraction of I_x(a, b) by Lentz's method."""
    c, d = 1.0, 1 / _not_zero(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, STEPS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        before = value
        for term in (even, odd):
            d = 1 / _not_zero(1 + term * d)
            c = _not_zero(1 + term / c)
            value *= c * d
        if abs(value - before) < 1e-15 * abs(value):
            break
    return value


def _not_zero(value: float) -> float:
    return value if abs(value) > TINY else TINY

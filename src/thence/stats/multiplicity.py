"""Several tests at once."""

from __future__ import annotations

from collections.abc import Sequence


def holm(p_values: Sequence[float], tests: int | None = None) -> list[float]:
    """Holm's step-down correction (S. Holm, A simple sequentially rejective multiple test procedure, 1979).

    Args:
        p_values: of the tests that could be made.
        tests: how many were planned, at least as many; default: those made. A planned one counts as p = 1.

    Returns:
        Corrected p-values, in the order given.
    """
    count = max(len(p_values), tests or 0)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        corrected[index] = largest
    return corrected

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


def holm_of_questions(asked: Sequence[Sequence[float]], tests: int | None = None) -> list[list[float]]:
    """Holm's correction where several questions are put to one quantity, at most one of whose hypotheses is true.

    Is a difference other than zero, and does it lie within a bound: both hypotheses (it is zero; it is beyond the
    bound) cannot be true. So a quantity counts once, however many questions it is asked, and no answer to any question
    about any quantity is wrong in more than a share alpha of all studies. This is the closed test (R. Marcus, E.
    Peritz and K. Gabriel, 1976) with Bonferroni's test of each intersection. In an intersection another quantity
    stands with whichever of its hypotheses is true, at worst the one with its largest p. So Holm's steps are those of
    the largest p of the others.

    Args:
        asked: p-values of the questions of each quantity that was tested, at least one a quantity.
        tests: how many quantities were planned, at least as many; default: those tested. A planned one counts as p = 1.

    Returns:
        Corrected p-values, in the order given. With one question each they are those of :func:`holm`.
    """
    largest = [max(p_values) for p_values in asked]
    corrected = []
    for index, p_values in enumerate(asked):
        others = largest[:index] + largest[index + 1 :]
        corrected.append([holm([p, *others], tests)[0] for p in p_values])
    return corrected

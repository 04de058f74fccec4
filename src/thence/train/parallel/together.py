"""One error for all ranks: what fails on one of them ends the others too, where they would wait for it forever."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from thence.errors import UserError, first_line
from thence.train.parallel.ranks import Ranks

T = TypeVar("T")


def together(ranks: Ranks, act: Callable[[], T]) -> T:
    """Act on every rank, and return once all have.

    Raises:
        Exception: what ``act`` raised here.
        UserError: it raised on another rank, which is named with its error.
    """
    failed, result = None, None
    try:
        result = act()
    except Exception as error:  # whatever it is, the others are told before it goes on
        failed = error
    said = ranks.gather(None if failed is None else _words(failed))
    if failed is not None:
        raise failed
    for rank, words in enumerate(said):
        if words is not None:
            problem, remedy = words
            raise UserError(f"rank {rank} failed: {problem}", remedy=remedy)
    return result  # pyright: ignore[reportReturnType] - of type T where nothing failed


def on_first_rank(ranks: Ranks, act: Callable[[], T]) -> T | None:
    """Act on the first rank while the others wait. Returns its result there, None elsewhere; raises as above."""
    return together(ranks, lambda: act() if ranks.rank == 0 else None)


def _words(error: Exception) -> tuple[str, str]:
    if isinstance(error, UserError):
        return error.problem, error.remedy
    return f"{type(error).__name__}: {first_line(error)}", "look at what that rank printed"

"""One error for all ranks: what fails on one of them ends the others too, where they would wait for it forever."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from thence.errors import UserError, first_line
from thence.explain import explained
from thence.train.parallel.ranks import Ranks

T = TypeVar("T")


def together(ranks: Ranks, act: Callable[[], T]) -> T:
    """Act on every rank, and return once all have.

    Raises:
        Exception: what ``act`` raised here.
        UserError: it raised on another rank, which is named with its error.

    Of errors that can be explained the first rank prints one; another rank prints what only its traceback tells.
    """
    failed, result = None, None
    try:
        result = act()
    except Exception as error:  # whatever it is, the others are told before it goes on
        failed = error
    said = ranks.gather(None if failed is None else _words(failed))
    if failed is not None:
        if explained(failed) is not None:
            failed.on_all_ranks = True  # pyright: ignore[reportAttributeAccessIssue] - any exception may carry it
        raise failed
    for rank, words in enumerate(said):
        if words is not None:
            raise _of_other(rank, *words)
    return result  # pyright: ignore[reportReturnType] - of type T where nothing failed


def on_first_rank(ranks: Ranks, act: Callable[[], T]) -> T | None:
    """Act on the first rank while the others wait. Returns its result there, None elsewhere; raises as above."""
    return together(ranks, lambda: act() if ranks.rank == 0 else None)


def _of_other(rank: int, problem: str, remedy: str) -> UserError:
    error = UserError(f"rank {rank} failed: {problem}", remedy=remedy)
    error.on_all_ranks = True
    return error


def _words(error: Exception) -> tuple[str, str]:
    known = explained(error)
    if known is None:
        return f"{type(error).__name__}: {first_line(error)}", "look at what that rank printed"
    problem, _, remedy = str(known).partition("\n  remedy: ")
    return problem, remedy

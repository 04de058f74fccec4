"""A few responses of every kind of verdict. What a model wrote is hostile text until proven otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from thence.foreign_text import visible

VERDICTS = ("right", "wrong", "graded", "unknown")
EACH = 3
_HEAD, _TAIL = 2500, 1000
"""Characters shown of a long text: its beginning and its end."""


@dataclass(frozen=True, slots=True)
class ShownSample:
    """One response as a page shows it."""

    verdict: str
    prompt: str
    response: str
    answer: str
    extracted: str
    reason: str
    where: str
    tokens: str
    score: str = ""


def first_of_each(found: Iterable[tuple[Any, Callable[[], ShownSample]]]) -> list[ShownSample]:
    """The first few samples of every verdict: not chosen by hand.

    Args:
        found: verdict and sample, in order. Reading stops where there are enough of each.
    """
    kept: dict[str, list[ShownSample]] = {verdict: [] for verdict in VERDICTS}
    for verdict, sample in found:
        if isinstance(verdict, str) and verdict in kept and len(kept[verdict]) < EACH:
            kept[verdict].append(sample())
        if all(len(samples) >= EACH for samples in kept.values()):
            break
    return [sample for verdict in VERDICTS for sample in kept[verdict]]


def excerpt(value: Any) -> str:
    """A value as text for a page, the middle of a long one left out."""
    text = visible("" if value is None else str(value))
    if len(text) <= _HEAD + _TAIL:
        return text
    left_out = len(text) - _HEAD - _TAIL
    return f"{text[:_HEAD]}\n[... {left_out:,} characters left out ...]\n{text[-_TAIL:]}"

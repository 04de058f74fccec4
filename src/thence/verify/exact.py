"""Exact match after a marker: the grader of the embedded world. Standard library only."""

from __future__ import annotations

from thence.data.numbers import normal_answer
from thence.verify.verdict import Grade, right, unknown, wrong


def grade_exact(response: str, answer: str | None, marker: str = "#", end: str = "$") -> Grade:
    """Compare the text after the last `marker` with `answer`, both in the normal form of `normal_answer`.

    Numbers in digits are the same however they are separated and padded (`1,234.50`, `1234.5`); any other text is
    compared character by character.

    Args:
        response: what the model wrote; the text `end` of an end token and white space around the answer do not count.
        answer: the gold answer; None gives an unknown verdict.
        marker: stands before the final answer. A response without it is wrong.
        end: text of the end token, in case it was decoded with the response.
    """
    if answer is None:
        return unknown("no gold answer")
    _, found, tail = response.rpartition(marker)
    if not found:
        return wrong(None, "no answer given")
    extracted = tail.strip().removesuffix(end).strip()
    return right(extracted) if normal_answer(extracted) == normal_answer(answer) else wrong(extracted)

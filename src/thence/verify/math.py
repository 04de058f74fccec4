"""Mathematical equality by math-verify, gold answer first, and the rules that say which text is graded.

Nothing here limits time or memory: `grade_math` belongs into a process of `thence.verify.pool`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from thence.verify.boxed import last_boxed, normal_form
from thence.verify.verdict import Grade, right, unknown, wrong

Rule = Literal["plain", "after_think", "boxed"]

EXTRACTED_CHARS = 500


def graded_part(response: str, rule: Rule) -> str | None:
    """The part of a response in which the final answer is looked for, or None where the rule finds none.

    plain: the whole response (reward version 4 of LUFFY's code, arXiv 2504.14945).
    after_think: what stands between the first and the second `</think>` (reward version 3 of the same code, the one
    that LUFFY and ReLIFT train with). The opening `<think>` belongs to the prompt there and counts as given, so that
    only a response without `</think>`, for example one that was cut off while thinking, has no part to grade.
    boxed: the last `\\boxed{...}` alone (reward version 6, the one of HPT and its baselines). A response without a box
    has no part to grade, whatever it says.
    """
    if rule == "plain":
        return response
    if rule == "boxed":
        inside = last_boxed(response)
        return None if inside is None else f"\\boxed{{{inside}}}"
    pieces = response.split("</think>", 2)
    return pieces[1] if len(pieces) > 1 else None


def grade_by_text(part: str, answer: str, rule: Rule) -> Grade | None:
    """RIGHT where a rule also takes answers that are written alike, and these are; None leaves it to `grade_math`.

    Only `boxed` does: an answer that no parser can read (a name, a set in words) is right when its normal form is the
    gold answer's.
    """
    if rule != "boxed":
        return None
    inside = last_boxed(part)
    if inside is None or not (normal := normal_form(inside)) or normal != normal_form(answer):
        return None
    return right(inside[:EXTRACTED_CHARS])


def grade_math(text: str, answer: str) -> Grade:
    """Whether the final answer in `text` equals the gold `answer`, found and compared by math-verify's own defaults.

    The gold answer is parsed as `$answer$`. Boxed answers go before others, later ones before earlier ones, and boxes
    joined by commas or `and` count as one set. An exception of the checker is an unknown verdict, not a wrong answer;
    it has the same score, 0.0, so that rewards agree with code that counts it as wrong.
    """
    import math_verify  # noqa: F401  (outside the try: an installation that is broken is not an answer that is)

    try:
        gold = _parse(f"${answer}$")
    except MemoryError:
        return unknown("memory")
    except Exception:
        gold = []
    if not gold:
        return unknown("no gold answer parsed")
    try:
        found = _parse(text)
    except Exception as error:
        return unknown(_name(error))
    if not found:
        return wrong(None, "no answer given")
    return _compare(gold, found)


def _compare(gold: Sequence[Any], found: Sequence[Any]) -> Grade:
    from math_verify import verify

    # Strings only: printing a sympy expression can take for ever.
    extracted = next((item[:EXTRACTED_CHARS] for item in reversed(found) if isinstance(item, str)), None)
    failure = ""
    # Pair by pair, so that an exception in one reading of the answer does not hide that another one is right.
    for expected in gold:
        for candidate in found:
            try:
                if verify(expected, candidate, timeout_seconds=None, raise_on_error=True):
                    return right(extracted)
            except Exception as error:
                failure = failure or _name(error)
    return unknown(failure, extracted) if failure else wrong(extracted)


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    return parse(text, parsing_timeout=0, raise_on_error=True)  # 0: off; the pool is the guard


def _name(error: Exception) -> str:
    return "memory" if isinstance(error, MemoryError) else f"exception {type(error).__name__}"

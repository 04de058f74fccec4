"""Mathematical equality by math-verify, gold answer first, and the rules that say which text is graded.

math-verify reads and compares. Before it, `notation` brings both sides into signs that it reads; after it, `claims`
looks at what the response says about the value, and `quantities` compares plain numbers exactly.

Nothing here limits time or memory: `grade_math` belongs into a process of `thence.verify.pool`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

from thence.verify.boxed import BOX, alike, last_boxed
from thence.verify.claims import Claim, claim_of, denied, find_claim, finished, names_a_value, objection, sides, stated
from thence.verify.notation import tidy, tidy_gold
from thence.verify.quantities import based, quantity, same, split_unit
from thence.verify.verdict import Grade, Verdict, right, unknown, wrong

Rule = Literal["plain", "after_think", "boxed"]

EXTRACTED_CHARS = 500
RULES_VERSION = 2
"""Goes up whenever a verdict may change: grades are stored with it, and others are graded again."""

NEAR = 1e-5  # numbers that math-verify takes for equal differ by no larger share


def graded_part(response: str, rule: Rule) -> str | None:
    """The part of a response in which the final answer is looked for, or None where the rule finds none.

    plain: the whole response (reward version 4 of LUFFY's code, arXiv 2504.14945), without thinking that never ended.
    after_think: what stands between the first and the second `</think>` (reward version 3 of the same code, the one
    that LUFFY and ReLIFT train with). The opening `<think>` belongs to the prompt there and counts as given, so that
    only a response without `</think>`, for example one that was cut off while thinking, has no part to grade.
    boxed: the last `\\boxed{...}` alone (reward version 6, the one of HPT and its baselines). A response without a box
    has no part to grade (see `unboxed_part`).
    """
    if rule == "plain":
        return finished(response)
    if rule == "boxed":
        inside = last_boxed(finished(response))
        return None if inside is None else f"\\boxed{{{inside}}}"
    pieces = response.split("</think>", 2)
    return pieces[1] if len(pieces) > 1 else None


def unboxed_part(response: str, rule: Rule) -> str | None:
    """The text to grade where the box rule finds no box, but the response marks its final answer otherwise; else None.

    A right answer there is RIGHT, for that is what the response says; its score is 0.0 (`without_reward`), for the
    published reward pays for boxes only.
    """
    response = finished(response)
    return response if rule == "boxed" and BOX not in response and stated(response) else None


def without_reward(grade: Grade) -> Grade:
    """The grade of an `unboxed_part` under the box rule."""
    return replace(grade, score=0.0, reason=grade.reason or "not in a box")


def grade_by_text(response: str, part: str, answer: str, rule: Rule) -> Grade | None:
    """The grade of what needs no parser; None leaves it to `grade_math`. Only the box rule has such answers.

    Right is what is written like the gold answer, although perhaps no parser can read it (a name, a set in words).
    Wrong is what the words beside the box deny.
    """
    if rule != "boxed":
        return None
    if denied(finished(response), answer):
        return wrong(last_boxed(part), "the response denies this answer")
    inside = last_boxed(part)
    if inside is None or not alike(inside, answer):
        return None
    return right(inside[:EXTRACTED_CHARS])


def grade_math(text: str, answer: str) -> Grade:
    """Whether the final answer in `text` equals the gold `answer`, found and compared by math-verify's own defaults.

    The gold answer is parsed as `$answer$`. Boxed answers go before others, later ones before earlier ones, and boxes
    joined by commas or `and` count as one set. An exception of the checker is an unknown verdict, not a wrong answer;
    it has the same score, 0.0, so that rewards agree with code that counts it as wrong.
    """
    import math_verify  # noqa: F401  (outside the try: an installation that is broken is not an answer that is)

    gold_text, text = tidy_gold(answer), tidy(text)
    try:
        gold = _parse_gold(gold_text)
    except MemoryError:
        return unknown("memory")
    except Exception:
        gold = []
    if not gold:
        return unknown("no gold answer parsed")
    claim = find_claim(text)
    if claim is not None and claim.mark in ("box", "####"):
        if not claim.text:
            return wrong(None, "no answer given")
        if claim.mark == "####":
            text = f"\\boxed{{{claim.text}}}" if quantity(claim.text) else claim.text
        if text.count(BOX) < 2 and (by_value := _by_value(claim, gold_text)) is not None:
            return by_value
    elif claim is not None and re.match(r"\s*(?:[.!\n]|$)", claim.after):
        by_value = _by_value(claim, gold_text)
        if by_value is not None and by_value == right(by_value.extracted):
            return by_value
    try:
        found = _parse(text)
    except Exception as error:
        return unknown(_name(error))
    grade = _compare(gold, found) if found else wrong(None, "no answer given")
    # Several boxes are one set, as in the papers' code: the last one alone gets no second chance.
    if grade.verdict is Verdict.WRONG and claim is not None and text.count(BOX) < 2:
        other = _readable(claim, gold_text)
        grade = _second(gold, other, grade) if other else grade
    if grade != right(grade.extracted):
        return grade
    claim = claim or claim_of(text, grade.extracted or "")
    reason = objection(claim, gold_text) or _equation_fault(claim.text, gold_text)
    return wrong(grade.extracted, reason) if reason else grade


def _by_value(claim: Claim, gold_text: str) -> Grade | None:
    """The grade where both sides are plain numbers, with or without a unit, or numbers in a base; else None."""
    extracted = claim.text[:EXTRACTED_CHARS]
    if (number := based(claim.text)) is not None:
        wanted = based(gold_text)
        plain = quantity(gold_text)
        if wanted is None and plain is None:
            return None
        equal = number == wanted if wanted is not None else plain is not None and number[0] == plain.value
        reason = objection(claim, gold_text) if equal else "another base or digit"
        equal = equal and not reason
        return right(extracted) if equal else wrong(extracted, reason)
    (given_text, given_unit), (gold_rest, gold_unit) = split_unit(claim.text), split_unit(gold_text)
    # Words of any kind may stand behind a number.
    words = (
        re.sub(r"(?<=.)\\(?:text|mbox|mathrm) ?\{[A-Za-z ]{1,40}\}$", "", given_text) if not given_unit else given_text
    )
    given, wanted = quantity(words), quantity(gold_rest)
    if given is None or wanted is None:
        return None
    kinds = {unit.kind for unit in (given_unit, gold_unit) if unit is not None}
    if "percent" in kinds:
        return None  # math-verify knows that 50% is 0.5, and takes 50 too
    factor = given_unit.size / gold_unit.size if given_unit and gold_unit and len(kinds) == 1 else 1
    equal = len(kinds) < 2 and same(wanted, type(given)(given.value * factor, given.decimal))
    if not equal:
        return wrong(extracted, "" if len(kinds) < 2 else "the units differ")
    reason = objection(Claim(given_text, claim.before, claim.after, claim.mark), gold_rest)
    return wrong(extracted, reason) if reason else right(extracted)


def _readable(claim: Claim, gold_text: str) -> str | None:
    """Another writing of a claim that math-verify did not take: a value stated outside of formulas, `5 = x` turned."""
    text = claim.text
    if claim.mark == "box" and alike(text, gold_text):
        return gold_text
    parts = sides(text)
    if len(parts) == 2 and re.fullmatch(r"[A-Za-z]", parts[1]) and not sides(gold_text):
        text = parts[0]
    text = re.sub(r"^(?:\\(?:text|mbox|mathrm) ?\{[^{}]*\}\s*)+(?=.)", "", text)
    percent = re.fullmatch(r"(.{1,50}?)\s*\\?%", gold_text)
    given = quantity(split_unit(text)[0])
    if percent and given and (wanted := quantity(percent[1])) and same(wanted, given):
        return gold_text
    if text == claim.text and (claim.mark != "answer" or not re.search(r"\d|\\[a-z]", text)):
        return None
    return text


def _second(gold: Sequence[Any], text: str, first: Grade) -> Grade:
    try:
        grade = _compare(gold, _parse(f"\\boxed{{{text}}}"))
    except Exception:
        return first
    return grade if grade == right(grade.extracted) else first


def _equation_fault(text: str, gold_text: str) -> str:
    """What is wrong with an equation whose right side is the gold answer: `-x=5`, `1=2`."""
    parts = sides(text)
    if not parts or sides(gold_text):
        return ""
    if not names_a_value(parts[0]):
        return "the left side is not the answer's name"
    values = [_value(part) for part in parts]
    for one, other in pairwise(values):
        if one is not None and other is not None and abs(one - other) > 0.01 * max(abs(one), abs(other)):
            return "the equation is false"
    return ""


def _value(side: str) -> complex | None:
    """The number that a side of an equation is, or None."""
    try:
        number = _parse(f"${side}$")[0]
        return complex(number.evalf(15)) if number.is_number else None
    except Exception:
        return None


def _compare(gold: Sequence[Any], found: Sequence[Any]) -> Grade:
    from math_verify import verify

    # Strings only: printing a sympy expression can take for ever.
    extracted = next((item[:EXTRACTED_CHARS] for item in reversed(found) if isinstance(item, str)), None)
    failure = ""
    # Pair by pair, so that an exception in one reading of the answer does not hide that another one is right.
    for expected in gold:
        for candidate in found:
            try:
                equal = verify(expected, candidate, timeout_seconds=None, raise_on_error=True)
                if equal and not _far_apart(expected, candidate):
                    return right(extracted)
            except Exception as error:
                failure = failure or _name(error)
    return unknown(failure, extracted) if failure else wrong(extracted)


def _parse_gold(text: str) -> list[Any]:
    """The readings of a gold answer.

    Of a formula that cannot be read whole, math-verify takes a number somewhere in it; its text is kept then.
    Of `N=n`, whose sides are one symbol to it, the right side is read.
    """
    from math_verify import LatexExtractionConfig, parse
    from sympy import Eq

    gold = _parse(f"${text}$")
    if quantity(text) is None and not any(isinstance(item, str) for item in gold[:1]):
        whole = parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=0, raise_on_error=True)
        gold = whole or gold
    if len(parts := sides(text)) == 2 and any(isinstance(item, Eq) and item.lhs == item.rhs for item in gold):
        return _parse(f"${parts[1]}$")
    return gold


def _far_apart(gold: Any, found: Any) -> bool:
    """Whether two values that are equal to some decimals are tiny and different, also inside of sets and tuples."""
    if isinstance(gold, str) or isinstance(found, str):
        return False
    from sympy import Eq, FiniteSet, Tuple

    if isinstance(gold, Eq) or isinstance(found, Eq):
        return _far_apart(*(side.rhs if isinstance(side, Eq) else side for side in (gold, found)))
    if isinstance(gold, (FiniteSet, Tuple)) and isinstance(found, (FiniteSet, Tuple)):
        pairs = [_ordered(side) if isinstance(gold, FiniteSet) else list(side.args) for side in (gold, found)]
        return any(_far_apart(one, other) for one, other in zip(*pairs, strict=False))
    if not (getattr(gold, "is_number", False) and getattr(found, "is_number", False)) or gold == found:
        return False
    pair: list[Any] = [gold, found]
    numbers = [number.evalf(20) for number in pair]
    sizes = [abs(number) for number in numbers]
    if not all(size.is_Float or size.is_Integer for size in sizes) or max(sizes) >= 0.5 or not max(sizes):
        return False
    return bool(abs(numbers[0] - numbers[1]) > NEAR * max(sizes))


def _ordered(values: Any) -> list[Any]:
    """The members of a set, numbers by size."""
    from sympy import default_sort_key

    return sorted(values.args, key=lambda value: default_sort_key(value.evalf() if hasattr(value, "evalf") else value))


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    return parse(text, parsing_timeout=0, raise_on_error=True)  # 0: off; the pool is the guard


def _name(error: Exception) -> str:
    return "memory" if isinstance(error, MemoryError) else f"exception {type(error).__name__}"

r"""What a response claims: where its final answer stands, and what it says about it.

math-verify reads the value and drops the words: `\boxed{\neq 42}`, `42\text{ is wrong}`, `-x=5`, "The answer is not 7".
Pure functions on text, standard library only; they look at short pieces around the answer, so their time is linear.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from thence.data.think import THINK_TAGS
from thence.verify.boxed import last_box
from thence.verify.quantities import quantity, split_unit

MAX_CHARS = 1000
"""Longer texts are not a final answer and are not checked."""
TAIL = 20_000
"""Of longer responses without marks, only the end is searched."""
AROUND = 60  # characters before and after an answer that can say something about it


@dataclass(frozen=True)
class Claim:
    """A final answer as it was written, with the text on both sides, and what marks it."""

    text: str
    before: str
    after: str
    mark: Literal["box", "####", "answer", "none"]


_HASHES = "####"
_ANSWER = re.compile(
    r"\banswer\b(?: to [^.:\n]{1,80}?)?[*_ ]{0,4}(?:is|was|:|=|would be|must be)[ :*_]{0,6}", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$|\*)")
_FORMULA = re.compile(r"\$\$?([^$\n]{1,500})\$|\\\(([^\n]{1,500}?)\\\)|\\\[([^\n]{1,500}?)\\\]")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}|,\s|;|:\s|$")


def finished(response: str) -> str:
    """A response without thinking that was begun and not ended, and "" where nothing stands after thinking that ended.

    A thought is no final answer: what stands before the tag that was opened last is all that counts.
    """
    for tags in THINK_TAGS:
        start = response.rfind(tags.opens)
        if start < 0:
            continue
        end = response.rfind(tags.closes)
        if end < start:
            response = response[:start]
        elif not response[end + len(tags.closes) :].strip() and not response[: response.find(tags.opens)].strip():
            return ""
    return response


def find_claim(text: str) -> Claim | None:
    """The last box; without one what follows the last `####`, or the last "answer is" or "Answer:"; else None."""
    if (box := last_box(text)) is not None:
        return _claim(text, *box, "box")
    start = text.rfind(_HASHES)
    if start >= 0:
        start += len(_HASHES)
        end = text.find("\n", start)
        return _claim(text, start, start, len(text) if end < 0 else end, None, "####")
    starts = [found.end() for found in _ANSWER.finditer(text)]
    if not starts:
        return None
    start = starts[-1]
    stop = _SENTENCE_END.search(text, start, start + MAX_CHARS)
    end = stop.start() if stop else min(len(text), start + MAX_CHARS)
    formula = _FORMULA.search(text, start, start + MAX_CHARS)
    if formula and formula.start() <= end and not re.search(r"\d", text[start : formula.start()]):
        return _claim(text, formula.start(), *formula.span(formula.lastindex or 0), formula.end(), "answer")
    word = _WORD.search(text, start, end)
    end = min(end, word.start() if word else end)
    return _claim(text, start, start, end, None, "answer") if text[start:end].strip(" *_") else None


def _claim(
    text: str, opens: int, start: int, end: int, closes: int | None, mark: Literal["box", "####", "answer", "none"]
) -> Claim:
    closes = end if closes is None else closes
    return Claim(text[start:end].strip(" *_$"), _before(text, opens), text[closes : closes + AROUND], mark)


def claim_of(text: str, extracted: str) -> Claim:
    """The claim of a response without marks: the last place where the extracted value stands."""
    tail = text[-TAIL:]
    places = [match.span() for match in re.finditer(rf"(?<![\w.]){re.escape(extracted)}(?!\w)", tail)]
    if not places:
        return Claim(extracted, "", "", "none")
    start, end = places[-1]
    return Claim(extracted, _before(tail, start), tail[end : end + AROUND], "none")


def _before(text: str, place: int) -> str:
    """The piece of the sentence before a place."""
    piece = text[max(0, place - AROUND) : place]
    return re.split(r"\n|[.!?]\s", piece)[-1]


_NOT = r"(?:\bnot\b|n't\b|\bnever\b|\bcannot\b|\\neq?(?![a-z])|\\not(?![a-z])|!=)"
_FILL = r"(?:\s*(?:equal|to|be|simply|just|exactly|quite|actually|really|the|a|an|correct|right|answer|value|=)\b)"
_NOT_BEFORE = re.compile(rf"{_NOT}(?:{_FILL}|=){{0,4}}[\s$*\\({{:=]*$", re.IGNORECASE)
_NOT_INSIDE = re.compile(
    r"\\neq?(?![a-z])|\\not(?![a-z])|\\lnot|\\neg(?![a-z])|!=|\bnot\b|\bcannot\b|n't\b"
    r"|\b(?:wrong|incorrect|false|never|neither|impossible|except|unknown)\b",
    re.IGNORECASE,
)
_JUDGED = re.compile(
    r"^[\s$*\\)}.,:(]{0,8}(?:(?:is|was|would be|be|seems|looks)\s+(?:\w+\s+)?(?:wrong|incorrect|false|impossible)\b"
    r"|(?:is|was)\s+not\s+(?:the|a|right|correct|it|possible|valid)\b|(?:isn't|wasn't|cannot|can't)\b"
    r"|(?:wrong|incorrect|false)\b)",
    re.IGNORECASE,
)
_OR_AFTER = re.compile(r"^[\s$*\\)}]{0,6},?\s*(?:or|to)\s+(?:\w+\s+)?[$\\(*{]{0,4}[-+]?\.?\d", re.IGNORECASE)
_OR_MORE = re.compile(r"^[\s$*\\)}]{0,6}or\s+(?:more|less|fewer|greater|above|below)\b", re.IGNORECASE)
_OR_BEFORE = re.compile(r"\d[\s$*\\)}]{0,6},?\s*or\s+(?:\w+\s+)?[$\\(*{]{0,4}$|\beither[\s$*\\({]{0,6}$", re.IGNORECASE)
_BOUND = re.compile(
    r"\b(?:at least|at most|(?:more|less|greater|fewer|larger|smaller|bigger) than|up to|over|under|above|below"
    r"|between|or more|or less|or fewer)\b",
    re.IGNORECASE,
)
_BOUND_BEFORE = re.compile(rf"\banswer\b[\w\s:*]{{0,12}}(?:{_BOUND.pattern}|[<>])[\s$\\(]*$", re.IGNORECASE)
_RELATION = re.compile(r"[<>]|\\(?:le|ge|leq|geq|lt|gt|leqslant|geqslant)(?![a-z])")
_LIST = re.compile(r"[,;]|\bor\b|\band\b|\\pm|\\cup|\\in(?![a-z])")
_COLON = re.compile(r"\d\s*:\s*\d")


def objection(claim: Claim, gold: str) -> str:
    """Why a claim whose value is the gold answer's is wrong all the same; "" where nothing speaks against it.

    Everything is allowed that the gold answer says too.
    """
    text = claim.text
    if len(text) > MAX_CHARS:
        return ""
    if not _NOT_INSIDE.search(gold) and (_NOT_INSIDE.search(text) or _NOT_BEFORE.search(claim.before)):
        return "the response denies this answer"
    if _JUDGED.search(claim.after):
        return "the response denies this answer"
    bounded = _RELATION.search(gold) or _BOUND.search(gold) or _LIST.search(gold) or "(" in gold or "[" in gold
    if not bounded and (_RELATION.search(text) or _BOUND.search(text)):
        return "the response gives a bound, not a value"
    if not bounded and _BOUND_BEFORE.search(claim.before):
        return "the response gives a bound, not a value"
    if claim.mark != "box" and not _LIST.search(gold):
        around = _OR_AFTER.search(claim.after) or _OR_MORE.search(claim.after) or _OR_BEFORE.search(claim.before)
        if around:
            return "the response gives several answers"
    if claim.mark == "none" and re.match(r"[\s$*\\)]{0,4}\?", claim.after):
        return "the response asks"
    if _COLON.search(text) and not _COLON.search(gold):
        return "the response gives a ratio or a time"
    members = [] if quantity(gold) else _members(gold)
    if len(set(members)) < len(members) > len(_members(text)):
        return "a member is missing"
    following = re.match(r"\s*[A-Za-z]{1,20}\b", claim.after) if claim.mark != "box" else None
    return _other_unit(text + (following[0] if following else ""), gold)


def _members(text: str) -> list[str]:
    """What commas, `and` and `or` outside of brackets separate."""
    members, depth = [""], 0
    for sign in re.sub(r"(?:,\s*)?\b(?:and|or)\b", ",", text.replace("{,}", "")[:MAX_CHARS]):
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and not depth:
            members.append("")
        elif not sign.isspace():
            members[-1] += sign
    return members


def _other_unit(text: str, gold: str) -> str:
    """Units that measure different things, or the same in different sizes."""
    _, wanted = split_unit(gold)
    _, given = split_unit(text)
    if wanted is None or given is None or wanted == given:
        return ""
    return "the units differ"


def denied(response: str, gold: str) -> bool:
    """Whether the words beside the last box say that it is not the answer: "The answer is not ...", "... is wrong"."""
    claim = find_claim(response)
    if claim is None or claim.mark != "box" or _NOT_INSIDE.search(gold):
        return False
    return bool(_NOT_BEFORE.search(claim.before) or _JUDGED.search(claim.after))


def stated(response: str) -> bool:
    """Whether a response without a box marks a final answer beyond a bare word or letter: `#### 18`, "Answer: 4"."""
    claim = find_claim(response)
    return claim is not None and claim.mark in ("####", "answer") and re.search(r"[\d=\\]", claim.text) is not None


_SIDES = re.compile(r"(?<![<>!:\\])=(?!=)")
_NUMBERS = re.compile(r"\\(?:[dt]?frac|cdot|times|left|right|div)(?![a-z])|[\d\s.+\-*/(){}]|\\[,;:! ]")


def sides(text: str) -> list[str]:
    """The sides of an equation or chain of equations, without the list that stands around; [] for anything else."""
    if len(text) > MAX_CHARS or "," in text.replace("{,}", "") or ";" in text or _RELATION.search(text):
        return []
    parts = [part.strip() for part in _SIDES.split(text)]
    return parts if len(parts) > 1 and all(parts) else []


def names_a_value(side: str) -> bool:
    """Whether a left side may stand before an answer as its name: `x`, `f(2)`, `m+n`, `\\sin x`, `x^2`; not `-x`, `2x`.

    A number times, over or added to one letter is another quantity than the letter.
    """
    negated = re.match(r"\s*-\s*(?=[A-Za-z\\])", side) is not None and not re.search(r"[-+]", side.strip()[1:])
    if re.search(r"[A-Za-z]\s*(?:\\left)?\(", side):
        return not negated
    left = _NUMBERS.sub("", side)
    if re.fullmatch(r"[A-Za-z]|\\[a-z]{2,10}", left) is None or "^" in side:
        return True
    return re.sub(r"[\s{}]|\\left|\\right|\\[,;:! ]", "", side).strip("()") == left

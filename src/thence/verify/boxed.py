"""The last boxed text of a response, and a normal form in which two ways to write one answer become the same text.

Standard library only, and time linear in the text, so that it may run outside the guarded processes.
"""

from __future__ import annotations

import re

BOX = "\\boxed"
NORMAL_CHARS = 1000
"""Longer texts are not final answers and are not normalised."""

_SPACES = re.compile(r"(?:\s+|\\[ ,;:!]|~|\\quad|\\qquad)+")
_DROPPED = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\^\{?\\circ\}?|\\?\$")
_WORDS = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox) ?\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\frac(?:(\d)(\d)|(\d)\{([^{}]*)\}|\{([^{}]*)\}(\d))")
_SLASHED = re.compile(r"(-?)(\d+)/(\d+)")
_SHORT_ROOT = re.compile(r"\\sqrt(\w)")
_NAMED = re.compile(r"^[A-Za-z]{1,2}=(?=.)")
_POINT_FIRST = re.compile(r"(?<!\d)\.(?=\d)")


def last_box(text: str) -> tuple[int, int, int, int] | None:
    r"""Where the last `\boxed{...}` of a text begins, its inside begins and ends, and where it ends.

    None without one, or where it is not closed. `\boxed 5` reaches up to the next `$` or the end of the line.
    """
    opens = text.rfind(BOX)
    if opens < 0:
        return None
    start = opens + len(BOX)
    while text[start : start + 1] == " ":
        start += 1
    if text[start : start + 1] != "{":
        inside = re.split(r"[$\n]", text[start:], maxsplit=1)[0].rstrip()
        end = start + len(inside)
        return (opens, start, end, end) if inside and not inside[0].isalpha() else None
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return opens, start + 1, place, place + 1
    return None


def last_boxed(response: str) -> str | None:
    r"""What stands inside the last `\boxed{...}` of a response: see `last_box`."""
    box = last_box(response)
    return None if box is None else response[box[1] : box[2]]


def normal_form(text: str) -> str:
    r"""One writing for what differs only in spaces, sizes of brackets, kinds of fraction, signs of dollar and degree,
    and the point at the end. Texts of more than 1,000 characters stay as they are.
    """
    if len(text) > NORMAL_CHARS:
        return text
    text = _WORDS.sub(r"\1", text.strip().removesuffix("."))
    text = _DROPPED.sub("", text)
    # A space between digits stays: `1 2` is not 12.
    text = re.sub(r"(?<=\d) (?=\d)", "\0", _SPACES.sub(" ", text)).replace(" ", "").replace("\0", " ")
    text = text.replace("\\%", "%")
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"(?<=\\frac) ", "", text)
    text = _SHORT_FRACTION.sub(_braced, text)
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    text = _POINT_FIRST.sub("0.", text)
    if whole := _SLASHED.fullmatch(text):
        text = f"{whole[1]}\\frac{{{whole[2]}}}{{{whole[3]}}}"
    return text


def alike(inside: str, answer: str) -> bool:
    """Whether two answers have the same normal form, where one may have a name (`x=`) that the other has not."""
    found, gold = normal_form(inside), normal_form(answer)
    if found and found == gold:
        return True
    named, named_gold = _NAMED.match(found), _NAMED.match(gold)
    return (named is None) != (named_gold is None) and _NAMED.sub("", found) == _NAMED.sub("", gold) != ""


def _braced(match: re.Match[str]) -> str:
    upper, lower = (part for part in match.groups() if part is not None)
    return f"\\frac{{{upper}}}{{{lower}}}"

"""The last boxed text of a response, and a normal form in which two ways to write one answer become the same text.

Standard library only, and time linear in the text, so that it may run outside the guarded processes.
"""

from __future__ import annotations

import re

BOX = "\\boxed"
NORMAL_CHARS = 1000
"""Longer texts are no final answers; they are not brought into a normal form."""

_SPACES = re.compile(r"\s+|\\[ ,;:!]|~|\\quad|\\qquad")
_DROPPED = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\^\{?\\circ\}?|\\?%|\\?\$")
_UNIT = re.compile(r"(?<=.)\\(?:text|mathrm|mbox) ?\{ [^{}]*\}$")
_WORDS = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox) ?\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\frac(?:(\d)(\d)|(\d)\{([^{}]*)\}|\{([^{}]*)\}(\d))")
_SLASHED = re.compile(r"(-?)(\d+)/(\d+)")
_SHORT_ROOT = re.compile(r"\\sqrt(\w)")
_NAMED = re.compile(r"^[A-Za-z]{1,2}=(?=.)")
_POINT_FIRST = re.compile(r"(?<!\d)\.(?=\d)")


def last_boxed(response: str) -> str | None:
    r"""What stands inside the last `\boxed{...}` of a response; None without one, or where it is not closed.

    `\boxed 5` gives what follows up to the next `$` or the end of the line.
    """
    start = response.rfind(BOX)
    if start < 0:
        return None
    rest = response[start + len(BOX) :].lstrip(" ")
    if not rest.startswith("{"):
        inside = re.split(r"[$\n]", rest, maxsplit=1)[0].strip()
        return inside if inside and not inside[0].isalpha() else None
    depth = 0
    for place, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:place]
    return None


def normal_form(text: str) -> str:
    r"""One writing for what differs only in spaces, sizes of brackets, kinds of fraction, units, signs of dollar,
    per cent and degree, a leading `x=` and the point at the end. Texts of more than 1,000 characters stay as they are.
    """
    if len(text) > NORMAL_CHARS:
        return text
    text = _UNIT.sub("", text.strip().removesuffix("."))
    text = _WORDS.sub(r"\1", text)
    text = _DROPPED.sub("", _SPACES.sub("", text))
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = _SHORT_FRACTION.sub(_braced, text)
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    text = _NAMED.sub("", text)
    text = _POINT_FIRST.sub("0.", text)
    if whole := _SLASHED.fullmatch(text):
        text = f"{whole[1]}\\frac{{{whole[2]}}}{{{whole[3]}}}"
    return text


def _braced(match: re.Match[str]) -> str:
    upper, lower = (part for part in match.groups() if part is not None)
    return f"\\frac{{{upper}}}{{{lower}}}"

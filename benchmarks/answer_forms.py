"""What a gold answer is: a number, tuple, list, equation, ...; and numbers in digits.

Nothing here uses the code under test.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Form:
    """What a gold answer is: its kind, its text without dollar signs, and its parts or value where it has them."""

    kind: str
    text: str
    value: Fraction | None = None
    parts: tuple[str, ...] = ()


_DIGITS = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")
_E = re.compile(r"([-+]?(?:\d+(?:\.\d*)?|\.\d+))e([-+]?\d+)")
_FRAC = re.compile(r"(-?)\\[dt]?frac ?(?:\{(-?\d+)\}\{(\d+)\}|(\d) ?(\d)|(\d)\{(\d+)\})")
_TEXT = re.compile(r"\\text\{\(?([A-Za-z]+)\)?\}")


def form_of(answer: str) -> Form:
    """The form of a gold answer."""
    text = re.sub(r"(?<!\\)\$", "", answer).strip().removesuffix(".")
    text = re.sub(r",\\!\s*", ",", text).removeprefix("\\quad")
    if re.fullmatch(r"\d{1,3}(,\d{3})+", text):
        return Form("integer", text, Fraction(text.replace(",", "")))
    if match := _E.fullmatch(text):
        return Form("e-notation", text, Fraction(match[1]) * Fraction(10) ** int(match[2]), (match[1], match[2]))
    if _DIGITS.fullmatch(text):
        value = Fraction(text)
        return Form("integer" if value.denominator == 1 else "decimal", text, value)
    if match := _FRAC.fullmatch(text):
        upper, lower = [part for part in match.groups()[1:] if part is not None]
        return Form("fraction", text, Fraction(f"{match[1]}{upper}".replace("--", "")) / int(lower), (upper, lower))
    for kind, pattern in (
        ("degrees", r"(-?[\d.]+) ?\^\{?\\circ\}?"),
        ("money", r"\\\$([\d.,]+)"),
        ("percent", r"([\d.]+) ?\\?%"),
        ("base", r"(\d+)_\{?\d\}?"),
    ):
        if match := re.fullmatch(pattern, text):
            return Form(kind, text, Fraction(match[1].replace(",", "")), (match[1],))
    if match := _TEXT.fullmatch(text):
        return Form("word", text, None, (match[1],))
    if "matrix" in text:
        return Form("matrix", text)
    if match := re.fullmatch(r"(\\left)?([(\[])(.*?)(\\right)?([)\]])", text):
        parts = _members(match[3])
        if len(parts) > 1 and _balanced(match[3]):
            kind = (
                "interval" if len(parts) == 2 and ("[" in match[2] or "]" in match[5] or "infty" in text) else "tuple"
            )
            return Form(kind, f"{match[2]}{match[3]}{match[5]}", None, tuple(parts))
    if len(parts := _members(text)) > 1 and not re.search(r"where|\\\{", text):
        return Form("list", text, None, tuple(parts))
    if text.count("=") == 1 and not re.search(r"[<>]|\\[gl]e", text):
        left, right = text.split("=")
        return Form("equation", text, None, (left.strip(), right.strip()))
    return Form("expression", text)


def _members(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    parts, depth, current = [], 0, ""
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += sign
    parts.append(current.strip())
    return parts if all(parts) else [text]


def _balanced(text: str) -> bool:
    depth = 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if depth < 0:
            return False
    return depth == 0


def digits_of(value: Fraction) -> str | None:
    """A number in digits; None where it has no finite decimal."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1:
        return None
    places = 0
    while (value * 10**places).denominator != 1:
        places += 1
    whole = str(abs((value * 10**places).numerator)).rjust(places + 1, "0")
    sign = "-" if value < 0 else ""
    return sign + (f"{whole[:-places]}.{whole[-places:]}" if places else whole)


def grouped(digits: str, separator: str) -> str:
    """Digits in groups of three."""
    whole, point, part = digits.partition(".")
    sign, whole = ("-", whole[1:]) if whole.startswith("-") else ("", whole)
    head = len(whole) % 3 or 3
    return sign + separator.join([whole[:head], *(whole[i : i + 3] for i in range(head, len(whole), 3))]) + point + part


def scientific(value: Fraction, times: str) -> str:
    """A number as a mantissa between 1 and 10 times a power of ten."""
    power, mantissa = 0, abs(value)
    while mantissa >= 10:
        mantissa, power = mantissa / 10, power + 1
    while mantissa < 1:
        mantissa, power = mantissa * 10, power - 1
    return f"{'-' if value < 0 else ''}{digits_of(mantissa)}{times}10^{{{power}}}"

"""One way to write a number, so that answers that are the same number are the same text. Standard library only."""

from __future__ import annotations

import re
from decimal import Decimal

_SEPARATED = re.compile(r"([-−]?[$€£]?[-−]?)(\d{1,3}(?:,\d{3})+|\d{1,3}(?:_\d{3})+)(\.\d+)?(%|\s+[^\d,()\[\]{}]+)?")
_PLAIN = re.compile(r"(?P<sign>-?)\$?(?P<whole>0|[1-9]\d*)(?:\.(?P<part>\d+))?(?P<percent>\s*\\?%)?")


def number_text(value: int | float | Decimal) -> str:
    """A finite number in digits: no exponent, no zeros at the end of a fraction, integers of any size exact.

    42.0 gives ``42``, 1e-05 gives ``0.00001``, -0.0 gives ``0``.
    """
    if isinstance(value, int):
        return str(int(value))
    exact = value if isinstance(value, Decimal) else Decimal(repr(float(value)))
    text = f"{exact:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text


def without_separators(text: str) -> str:
    """A text that is one number with thousands separators, without them; any other text as it is.

    Separators are commas (or underscores) before groups of exactly three digits, and no other digits, commas or
    brackets stand in the text: ``1,234``, ``-12,345.6``, ``$1,000`` and ``2,500 apples`` lose theirs, while ``3,5``,
    ``(1,234)``, ``1,2345`` and ``1,000, 2,000`` stay. A minus sign of typesetting becomes ``-`` in a number.
    """
    if found := _SEPARATED.fullmatch(text):
        sign, whole, part, unit = found.groups(default="")
        text = sign + whole.replace(",", "").replace("_", "") + part + unit
    return re.sub(r"^([$€£]?)−(?=[$€£]?[\d.])", r"\1-", text)


def normal_answer(text: str) -> str:
    """The normal form in which two answers are compared as texts.

    Of a number in digits: without thousands separators and without zeros at the end of its fraction, a leading dollar
    sign dropped, `%` without a space or backslash before it: ``$1,000.00`` is ``1000``, ``−0.50`` is ``-0.5``. Any
    other text is itself without white space around it: fractions, numbers with an exponent, with leading zeros or a
    plus sign are compared character by character.
    """
    text = without_separators(text.strip())
    found = _PLAIN.fullmatch(text.replace("$-", "-$", 1))
    if not found:
        return text
    part = (found["part"] or "").rstrip("0")
    number = found["whole"] + ("." + part if part else "")
    sign = "" if number == "0" else found["sign"]
    return sign + number + ("%" if found["percent"] else "")

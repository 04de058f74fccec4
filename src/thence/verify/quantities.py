r"""Plain numbers, numbers in another base, and units of a final answer. Standard library only."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

MAX_CHARS = 200
"""Longer texts are no single number."""

SAME_DECIMALS = 6
SAME_SHARE = Fraction(1, 100_000)
"""Two numbers of which one is a decimal are the same to six decimals (math-verify's rule) if also to this share."""

_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)"
_DECIMAL = re.compile(rf"([-+]?)({_NUMBER})")
_POWER = re.compile(rf"([-+]?)(?:({_NUMBER})(?:\\times|\\cdot|\*|x))?10\^(?:\{{([-+]?\d{{1,3}})\}}|([-+]?\d{{1,3}}))")
_RATIO = re.compile(rf"([-+]?)({_NUMBER})/([-+]?{_NUMBER})")
_FRACTION = re.compile(
    rf"([-+]?)(\d*)\\frac(?:\{{([-+]?{_NUMBER})\}}\{{([-+]?{_NUMBER})\}}|(\d)(\d)|(\d)\{{(\d+)\}}|\{{(\d+)\}}(\d))"
)
_COMMAS = re.compile(r"(?<![\d.])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
_MIXED = re.compile(r"([-+]?)(\d+) (\d+)/(\d+)")
_BLANK = re.compile(r"\s+|\\[,;:! ]|~|\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\quad")
_BASE_WORDS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10} | {
    "twelve": 12,
    "sixteen": 16,
}
_BASED = re.compile(
    r"([-+]?)([0-9][0-9A-Z]*)_?\{?(?:\\(?:text|mathrm)\{)?\(?(?:(?<=_)|(?<=_\{)|(?:in)?base)"
    r"(?:\\(?:text|mathrm)\{)?(?:base)?\}?(\d{1,2}|" + "|".join(_BASE_WORDS) + r")\)?\}*"
)


@dataclass(frozen=True)
class Quantity:
    """A number as it was written: its exact value, and whether it has a decimal point or a power of ten."""

    value: Fraction
    decimal: bool


def quantity(text: str) -> Quantity | None:
    r"""The number that a text is: `-1,234.5`, `3/4`, `1\frac12`, `2.5\times 10^{-3}`; None for anything else."""
    if len(text) > MAX_CHARS:
        return None
    text = re.sub(r"\\[dtc]frac", r"\\frac", _BLANK.sub(" ", text)).strip()
    if mixed := _MIXED.fullmatch(text):
        text = f"{mixed[1]}{mixed[2]}\\frac{{{mixed[3]}}}{{{mixed[4]}}}"
    elif re.search(r"\d +\d", text.replace("\\frac ", "\\frac")):
        return None  # `1 2` is not 12
    text = text.replace(" ", "")
    text = _COMMAS.sub(lambda m: m[0].replace(",", ""), text)
    if text.startswith("{") and text.endswith("}") and "{" not in text[1:]:
        text = text[1:-1]
    try:
        return _read(text)
    except ZeroDivisionError:
        return None


def _read(text: str) -> Quantity | None:
    if match := _DECIMAL.fullmatch(text):
        return Quantity(_signed(match[1], Fraction(match[2])), "." in match[2])
    if match := _POWER.fullmatch(text):
        power = Fraction(10) ** int(match[3] or match[4])
        return Quantity(_signed(match[1], Fraction(match[2] or 1) * power), "." in (match[2] or ""))
    if match := _RATIO.fullmatch(text):
        decimal = "." in match[2] + match[3]
        return Quantity(_signed(match[1], Fraction(match[2]) / Fraction(match[3])), decimal)
    if match := _FRACTION.fullmatch(text):
        upper, lower = [part for part in match.groups()[2:] if part is not None]
        part = Fraction(upper) / Fraction(lower)
        if match[2] and part < 0:
            return None
        return Quantity(_signed(match[1], Fraction(match[2] or 0) + part), "." in upper + lower)
    return None


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def same(gold: Quantity, found: Quantity) -> bool:
    """Equal; where one has decimals, equal to six of them and to five digits, so that tiny numbers differ too."""
    if gold.value == found.value:
        return True
    if not (gold.decimal or found.decimal):
        return False
    gap = abs(gold.value - found.value)
    close = round(gold.value, SAME_DECIMALS) == round(found.value, SAME_DECIMALS)
    return close and gap <= SAME_SHARE * max(abs(gold.value), abs(found.value))


def based(text: str) -> tuple[int, int] | None:
    r"""Value and base of a number in another base: `42_8`, `42_{8}`, `42\text{ (base 8)}`; None for anything else."""
    if len(text) > MAX_CHARS:
        return None
    match = _BASED.fullmatch(_BLANK.sub("", text))
    if match is None:
        return None
    base = _BASE_WORDS.get(match[3]) or int(match[3])
    try:
        return int(match[1] + match[2], base), base
    except ValueError:  # a digit that the base has not, or no base
        return None


_UNITS: dict[str, tuple[str, Fraction]] = {
    name: (kind, Fraction(size))
    for kind, sizes in tomllib.loads(Path(__file__).with_name("units.toml").read_text(encoding="utf-8")).items()
    for size, names in sizes.items()
    for name in names
}
"""By name: what is measured, and the size in the first unit of its kind."""

_TAIL = re.compile(
    r"(?:\\(?:text|mathrm|mbox|textrm|operatorname) ?\{ *([^{}]{1,40}?)\.? *\}|(?<=[\d}\s,;])(\\?[A-Za-z/]{1,20}|\\?%)"
    r"|\{?(\^\{?\\circ\}?)\}?)(?:\^\{?([23])\}?)?$"
)
_WORDS = re.compile(r"(square|cubic|sq\.?|cu\.?) +(.+)")
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}


@dataclass(frozen=True)
class Unit:
    """What is measured (kind and power), and the unit's size in the first unit of its kind."""

    kind: str
    size: Fraction


def split_unit(text: str) -> tuple[str, Unit | None]:
    r"""A text without the unit at its end (or `\$` before it), and the unit where it is a known one."""
    text = text.strip().rstrip(".")
    if len(text) > MAX_CHARS:
        return text, None
    money = re.match(r"([-+]?) ?(?:\\\$|\$)", text)
    if money:
        return money[1] + text[money.end() :], Unit("money", Fraction(100))
    match = _TAIL.search(text)
    if match is None or not match.start():
        return text, None
    name = match[1] or match[2] or r"^\circ"
    power = int(match[4] or 1)
    if words := _WORDS.fullmatch(name):
        power, name = _POWERS[words[1].rstrip(".")], words[2]
    elif inner := re.fullmatch(r"(.*?)\^?\{?([23])\}?", name):
        name, power = inner[1], int(inner[2])
    known = _known(name)
    if known is None:
        return text, None
    rest = re.sub(r"(?:\\[,;:! ]|~|\s)+$", "", text[: match.start()])
    kind, size = known
    return rest, Unit(kind if power == 1 else f"{kind}^{power}", size**power)


def _known(name: str) -> tuple[str, Fraction] | None:
    name = name.strip() if len(name) < 3 else name.strip().lower()
    return _UNITS.get(name) or _UNITS.get(name.removesuffix("s"))

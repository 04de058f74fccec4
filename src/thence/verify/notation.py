r"""One way to write what people write in several: Unicode signs, thousands, e-notation, text in formulas.

Pure functions on text, standard library only, time linear in it. They change no value: `½` becomes `\frac{1}{2}`,
`1\,234` becomes `1234`, `3e8` becomes `300000000`. What they give is read by math-verify.
"""

from __future__ import annotations

import re
import unicodedata

MAX_EXPONENT = 60
"""Larger powers of ten stay as they are: no gold answer has them, and their digits would fill the memory."""

_SIGNS = {
    "\N{MINUS SIGN}": "-",
    "\N{FRACTION SLASH}": "/",
    "\N{DIVISION SLASH}": "/",
    "\N{INFINITY}": r"\infty ",
    "\N{DEGREE SIGN}": r"^\circ ",
    "\N{MULTIPLICATION SIGN}": r"\times ",
    "\N{MIDDLE DOT}": r"\cdot ",
    "\N{DOT OPERATOR}": r"\cdot ",
    "\N{DIVISION SIGN}": r"\div ",
    "\N{LESS-THAN OR EQUAL TO}": r"\le ",
    "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
    "\N{NOT EQUAL TO}": r"\neq ",
    "\N{ALMOST EQUAL TO}": r"\approx ",
    "\N{PLUS-MINUS SIGN}": r"\pm ",
    "\N{UNION}": r"\cup ",
    "\N{INTERSECTION}": r"\cap ",
    "\N{ELEMENT OF}": r"\in ",
    "\N{EMPTY SET}": r"\emptyset ",
    "\N{IDEOGRAPHIC SPACE}": " ",
    "\N{NO-BREAK SPACE}": "~",
    "\N{THIN SPACE}": r"\,",
    "\N{NARROW NO-BREAK SPACE}": r"\,",
    "\N{FIGURE SPACE}": r"\,",
    "\N{HAIR SPACE}": r"\,",
    "\N{ZERO WIDTH SPACE}": "",
    "\N{WORD JOINER}": "",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
}
_GREEK = ("alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "pi", "rho", "sigma", "tau", "phi")
_TABLE: dict[int, str] = {
    **{ord(sign): text for sign, text in _SIGNS.items()},
    **{
        ord(unicodedata.lookup(f"GREEK SMALL LETTER {name.replace('lambda', 'lamda')}")): f"\\{name} "
        for name in _GREEK
    },
    **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full-width forms
    **{code: unicodedata.normalize("NFKC", chr(code)) for code in range(0x1D7CE, 0x1D800)},  # mathematical digits
}
_VULGAR = re.compile("[\N{VULGAR FRACTION ONE QUARTER}-\N{VULGAR FRACTION THREE QUARTERS}\u2150-\u215e\u2189]")
_RAISED = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b\u207f\u2071]+")
_LOWERED = re.compile("[\u2080-\u2089]+")
_ROOT = re.compile(r"([\u221a\u221b\u221c])\s*(?:\(([^()]{1,200})\)|\{([^{}]{1,200})\}|(\d+(?:\.\d+)?|[A-Za-z]))")
_ROOTS = {"\u221a": r"\sqrt", "\u221b": r"\sqrt[3]", "\u221c": r"\sqrt[4]"}

_SEPARATOR = r"(?:\\[,;:! ]|\{\\,\}|\{,\}|,\\!\s?|~)"
_THOUSANDS = re.compile(rf"(?<![\d.,])([1-9]\d{{0,2}})((?:{_SEPARATOR}\d{{3}}){{1,20}})(?![\d,]|\{{,\}}\d|\\[,;!]\d)")
_E_NOTATION = re.compile(
    r"(?<![\w.\\^_])(?<![\^_]\{)(\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})[eE]([-+]?\d{1,3})(?![\w^]|\.\d)"
)
_NUMPY = re.compile(r"\bnp\.(?=(?:arc)?(?:sin|cos|tan)h?\(|(?:exp|log|sqrt)\()")
_TEXT = re.compile(r"\\(?:text|mbox|textrm|textnormal|mathrm|textbf|mathbf) ?\{([^{}]{0,500})\}")
_SPEAKS = re.compile(r"\b(?:or|and)\b|(?<![A-Za-z^\d])\d", re.IGNORECASE)


def tidy(text: str) -> str:
    """A response in the signs that math-verify reads. ASCII without thousands, e-notation and text stays as it is."""
    if not text.isascii():
        text = _from_unicode(text)
    text = _THOUSANDS.sub(_joined, text)
    text = _E_NOTATION.sub(_digits, text)
    text = _NUMPY.sub(r"\\", text)
    text = re.sub(r"(?<=\d)\.(?=/\d)", "", text)  # -1./3 as programs write it
    text = re.sub(r"(?<!\\)\\[,;:]", " ", text)
    return _TEXT.sub(_spoken, text)


def tidy_gold(answer: str) -> str:
    """The same for a gold answer, without the dollar signs of formulas (`\\$` stays)."""
    answer = re.sub(r"(?<!\\)\$", "", answer)
    return tidy(answer).strip().removesuffix(".")


def _from_unicode(text: str) -> str:
    text = _ROOT.sub(lambda m: f"{_ROOTS[m[1]]}{{{m[2] or m[3] or m[4]}}}", text)
    text = _VULGAR.sub(_fraction, text)
    text = _RAISED.sub(lambda m: f"^{{{_plain_digits(m[0])}}}", text)
    text = _LOWERED.sub(lambda m: f"_{{{_plain_digits(m[0])}}}", text)
    text = re.sub("(^|[\\s({\\[,=$])[\u2013\u2010\u2011](?=\\d)", r"\1-", text)  # dashes that stand for a minus
    return text.translate(_TABLE)


def _plain_digits(signs: str) -> str:
    return unicodedata.normalize("NFKC", signs).replace("\N{MINUS SIGN}", "-")


def _fraction(match: re.Match[str]) -> str:
    upper, _, lower = unicodedata.normalize("NFKC", match[0]).partition("\N{FRACTION SLASH}")
    return f"\\frac{{{upper}}}{{{lower}}}" if lower else match[0]


def _joined(match: re.Match[str]) -> str:
    return match[1] + "".join(re.findall(r"\d{3}", match[2]))


def _digits(match: re.Match[str]) -> str:
    power = int(match[2])
    if abs(power) > MAX_EXPONENT:
        return f"{match[1]}\\times 10^{{{power}}}"
    whole, _, part = match[1].partition(".")
    digits, point = whole + part, len(whole) + power
    if point <= 0:
        digits, point = "0" * (1 - point) + digits, 1
    digits = digits.ljust(point, "0")
    upper, lower = digits[:point].lstrip("0") or "0", digits[point:]
    return f"{upper}.{lower}" if lower else upper


def _spoken(match: re.Match[str]) -> str:
    """Text that names further values is part of the answer: math-verify drops it as if it were a unit."""
    inside = match[1]
    return f" {inside.strip()} " if _SPEAKS.search(inside) and "mod" not in inside else match[0]

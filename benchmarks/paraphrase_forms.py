r"""Other ways to write an answer, and near misses: what a program can say about a gold answer without any checker.

Each gold answer gets three paraphrases, which a careful person calls right, and three near misses, which are wrong.
Both come from its form (number, tuple, list, equation, ...) and rotate with the row, so that every way is taken often.
Nothing here uses the code under test.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from answer_forms import Form, digits_of, form_of, grouped, scientific

PER_GOLD = 3


@dataclass(frozen=True)
class Written:
    """A response made from a gold answer: the way it was made, its text, and whether it is right."""

    way: str
    response: str
    right: bool


def paraphrases(answer: str, turn: int) -> list[Written]:
    """Three other ways to write an answer, taken in turn from those that its form has."""
    form = form_of(answer)
    ways = [Written(way, response, True) for way, response in _WAYS.get(form.kind, _other)(form) + _any_form(form)]
    return _some(ways, turn, answer)


def near_misses(answer: str, turn: int) -> list[Written]:
    """Three wrong answers that look like the gold answer."""
    form = form_of(answer)
    if form.value is not None:
        found = _wrong_numbers(form)
    elif form.kind in ("tuple", "interval", "list"):
        found = _wrong_members(form)
    elif form.kind == "word":
        word = form.parts[0]
        other = "north" if word != "north" else "south"
        found = [
            ("another word", _box(f"\\text{{{other}}}") if len(word) > 1 else _box("\\text{(D)}")),
            ("denied", _box(f"\\text{{not {word}}}")),
            ("two answers", _box(f"\\text{{{word}}} \\text{{ or }} \\text{{{other}}}")),
        ]
    else:
        found = _wrong_expressions(form)
    return _some([Written(way, response, False) for way, response in found], turn, answer)


def _some(written: list[Written], turn: int, answer: str) -> list[Written]:
    """Three of them, beginning at the turn; none that is the gold answer in a box, none twice."""
    distinct = {one.response: one for one in written if one.response != _box(answer)}
    rows = list(distinct.values())
    return [rows[(turn + i) % len(rows)] for i in range(min(PER_GOLD, len(rows)))]


def _box(inside: str) -> str:
    return f"So it is $\\boxed{{{inside}}}$."


def _number(form: Form) -> list[tuple[str, str]]:
    value = form.value or Fraction(0)
    digits = digits_of(value) or form.text
    wide = "".join(chr(ord(d) + 0xFEE0) if d.isdigit() else d for d in digits)
    found = [
        ("a sentence", f"Therefore, the answer is {digits}."),
        ("trailing zeros", _box(digits + ("0" if "." in digits else ".00"))),
        ("a named value", _box(f"x = {digits}")),
        ("words after it", _box(f"{digits}\\text{{ points}}")),
        ("hashes", f"We add them up.\n#### {digits}"),
        ("full-width digits", _box(wide)),
        ("a longer fraction", _box(f"\\frac{{{2 * value.numerator}}}{{{2 * value.denominator}}}")),
        ("spaces", _box(f"\\, {digits} \\,")),
    ]
    if abs(value) >= 1000:
        separators = {"{,}": "braced commas", "\\,": "thin spaces", ",": "commas", "\u202f": "narrow spaces"}
        found += [(name, _box(grouped(digits, sign))) for sign, name in separators.items()]
    if value and (abs(value) >= 100 or abs(value) < Fraction(1, 10)):
        found += [("scientific", _box(scientific(value, " \\times ")))]
    if value < 0:
        found += [("minus sign", _box(digits.replace("-", "\N{MINUS SIGN}")))]
    return found


def _scientific_number(form: Form) -> list[tuple[str, str]]:
    value = form.value or Fraction(0)
    digits = digits_of(value) or ""
    return [
        ("scientific", _box(scientific(value, " \\times "))),
        ("digits", _box(digits)),
        ("a sentence, scientific", "The answer is $" + scientific(value, " \\times ") + "$."),
        ("scientific with a dot", _box(scientific(value, " \\cdot ") + "\\text{ units}")),
        ("grouped digits", _box(grouped(digits, "{,}"))),
        ("e-notation in a sentence", f"The answer is {form.text}."),
    ]


def _fraction(form: Form) -> list[tuple[str, str]]:
    value = form.value or Fraction(0)
    upper, lower = value.numerator, value.denominator
    sign = "-" if upper < 0 else ""
    found = [
        ("a slash", _box(f"{upper}/{lower}")),
        ("a large fraction", _box(f"{sign}\\dfrac{{{abs(upper)}}}{{{lower}}}")),
        ("sign above", _box(f"\\frac{{{upper}}}{{{lower}}}")),
        ("a longer fraction", _box(f"\\frac{{{3 * upper}}}{{{3 * lower}}}")),
        ("a sentence", f"The answer is $\\frac{{{upper}}}{{{lower}}}$."),
        ("a slash in a sentence", f"The answer is {upper}/{lower}."),
    ]
    if value == Fraction(1, 2):
        found += [("one sign", _box("\N{VULGAR FRACTION ONE HALF}"))]
    if abs(upper) > lower:
        whole, rest = divmod(abs(upper), lower)
        found += [("a mixed number", _box(f"{sign}{whole}\\frac{{{rest}}}{{{lower}}}"))]
    if (digits := digits_of(value)) is not None:
        found += [("a decimal", _box(digits))]
    return found


def _with_unit(form: Form) -> list[tuple[str, str]]:
    digits = form.parts[0]
    ways = {
        "degrees": [
            ("no unit", digits),
            ("a sign", f"{digits}\N{DEGREE SIGN}"),
            ("a unit in words", f"{digits}\\text{{ degrees}}"),
        ],
        "money": [
            ("no unit", digits),
            ("a unit in words", f"{digits}\\text{{ dollars}}"),
            ("a sign", f"\\${digits}.00"),
        ],
        "percent": [
            ("a sign", f"{digits}\\%"),
            ("a unit in words", f"{digits}\\text{{ percent}}"),
            ("no unit", digits),
            ("a share", digits_of((form.value or Fraction(0)) / 100) or digits),
        ],
        "base": [("braces", re.sub(r"_\{?(\d)\}?", r"_{\1}", form.text)), ("spaces", re.sub("_", " _ ", form.text))],
    }[form.kind]
    found = [
        (way, _box(text)) for way, text in ways if not (way == "a sign" and "." in digits and form.kind == "money")
    ]
    return [*found, ("a sentence", f"The answer is ${form.text}$.")]


def _word(form: Form) -> list[tuple[str, str]]:
    word = form.parts[0]
    return [("bare", _box(word)), ("bold", _box(f"\\textbf{{{word}}}")), ("upright", _box(f"\\mathrm{{{word}}}"))]


def _tuple(form: Form) -> list[tuple[str, str]]:
    opens, closes = form.text[0], form.text[-1]
    inside = form.text[1:-1].replace("\\frac", "\\dfrac")
    return [
        ("spaces", _box(opens + " " + ",\\; ".join(form.parts) + " " + closes)),
        ("large brackets", _box(f"\\left{opens}{inside}\\right{closes}")),
        ("a sentence", f"The answer is ${form.text}$."),
    ]


def _list(form: Form) -> list[tuple[str, str]]:
    turned = ", ".join(reversed(form.parts))
    found = [
        ("another order", _box(turned)),
        ("and", _box(", ".join(form.parts[:-1]) + " \\text{ and } " + form.parts[-1])),
        ("a sentence", f"The answer is ${', '.join(form.parts)}$."),
        ("spaces", _box(",\\; ".join(form.parts))),
    ]
    return found if any("(" in part for part in form.parts) else [*found, ("a set", _box(f"\\{{{turned}\\}}"))]


def _equation(form: Form) -> list[tuple[str, str]]:
    left, right = form.parts
    found = [("spaces", _box(f"{left} \\;=\\; {right}")), ("a sentence", f"The answer is ${form.text}$.")]
    name = re.fullmatch(r"[A-Za-z](\([a-z]\))?", left) is not None
    return [*found, ("the value alone", _box(right))] if name else found


def _other(form: Form) -> list[tuple[str, str]]:
    return []


def _any_form(form: Form) -> list[tuple[str, str]]:
    """Ways that every formula has."""
    text = form.text
    found = [
        ("in a box", _box(text)),
        ("spaces", _box(f"\\, {text} \\,")),
        ("a sentence", f"The answer is ${text}$."),
        ("display style", f"\\[ \\boxed{{\\displaystyle {text}}} \\]"),
    ]
    if "\\frac" in text:
        found += [("large fractions", _box(text.replace("\\frac", "\\dfrac")))]
    if form.kind == "expression" and not re.search(r"\\text|\\mbox|\\pm|\\cup|=|[<>]|\\in\b|\\ge|infty|where", text):
        found += [
            ("in brackets", _box(f"\\left({text}\\right)")),
            ("times one", _box(f"1 \\cdot \\left({text}\\right)")),
        ]
    return found


def _wrong_numbers(form: Form) -> list[tuple[str, str]]:
    value = form.value or Fraction(0)
    text = form.text
    next_digit = _next_digit(form)
    found = [
        ("digit", _box(next_digit)),
        ("denied", _box(f"\\neq {text}")),
        ("two answers", _box(f"{text} \\text{{ or }} {next_digit}")),
        ("extra member", _box(f"{text}, {next_digit}")),
        ("denied in words", _box(f"{text}\\text{{ is wrong}}")),
        ("not the answer", f"The answer is not ${text}$."),
        ("a bound", _box(f"x > {text}")),
    ]
    if form.kind in ("integer", "decimal"):
        digits = digits_of(value) or text
        other = "percent" if form.kind == "decimal" else "base"
        found += (
            [(other, _box(f"{digits}\\%" if other == "percent" else f"{digits}_{{11}}"))]
            if abs(value) >= 11 or (other == "percent")
            else []
        )
        found += [("ten times", _box(digits_of(value * 10) or text))] if value else []
    if value:
        found += [("sign", _box(f"-{text}" if value > 0 else text.replace("-", "", 1)))]
        found += [("negated name", _box(f"-x = {text}"))]
    if form.kind == "e-notation":
        found += [
            ("power", _box(scientific(value * 10, " \\times "))),
            ("Euler's number", _box(f"{digits_of(Fraction(form.parts[0]) * abs(int(form.parts[1])))}e")),
            ("zero", _box("0")),
        ]
    return found


def _next_digit(form: Form) -> str:
    """The text with its first digit that is not a zero, or else its last, one higher (nine becomes eight)."""
    places = [m.start() for m in re.finditer(r"[1-9]", form.text)] or [m.start() for m in re.finditer(r"\d", form.text)]
    place = places[0]
    digit = form.text[place]
    return form.text[:place] + ("8" if digit == "9" else str(int(digit) + 1)) + form.text[place + 1 :]


def _wrong_members(form: Form) -> list[tuple[str, str]]:
    parts = list(form.parts)
    opens, closes = ("", "") if form.kind == "list" else (form.text[0], form.text[-1])

    def box(members: list[str]) -> str:
        return _box(opens + ", ".join(members) + closes)

    changed = (
        [f"{parts[0]}+7", *parts[1:]]
        if "(" not in parts[0] and not re.search("=|infty", parts[0])
        else ["91", *parts[1:]]
    )
    found = [("digit", box(changed)), ("extra member", box([*parts, "97"])), ("missing member", box(parts[:-1]))]
    if form.kind == "tuple" and parts != parts[::-1]:
        found += [("order", box(parts[::-1]))]
    if form.kind == "interval":
        swapped = {"(": "[", "[": "(", ")": "]", "]": ")"}
        at = 0 if "infty" not in parts[0] else 1
        ends = [opens, closes]
        ends[at] = swapped[ends[at]]
        found += [("bracket", _box(ends[0] + ", ".join(parts) + ends[1]))]
    return found


def _wrong_expressions(form: Form) -> list[tuple[str, str]]:
    text = form.text
    if form.kind == "matrix":
        return [
            ("digit", _box(_next_digit(form))),
            ("denied", _box(f"\\neq {text}")),
            ("twice", _box(f"2{text}")),
        ]
    if form.kind == "equation":
        left, right = form.parts
        return [
            ("plus one", _box(f"{left}={right}+1")),
            ("twice", _box(f"{left}=2\\left({right}\\right)+3")),
            ("denied", _box(f"{left} \\neq {right}")),
        ]
    found = [("denied", _box(f"\\neq {text}")), ("not the answer", f"The answer is not ${text}$.")]
    if re.search(r"\d", text):
        found += [("digit", _box(_next_digit(form)))]
    if not re.search(r"\\text|\\mbox|\\cup|=|[<>]|\\in\b|\\ge|infty|where|\\\{", text):
        found += [("plus one", _box(f"{text}+1")), ("twice", _box(f"2\\left({text}\\right)+1"))]
        found += [] if "\\pm" in text else [("sign", _box(f"-\\left({text}\\right)"))]
    return found


_WAYS: dict[str, Callable[[Form], list[tuple[str, str]]]] = {
    "integer": _number,
    "decimal": _number,
    "e-notation": _scientific_number,
    "fraction": _fraction,
    "degrees": _with_unit,
    "money": _with_unit,
    "percent": _with_unit,
    "base": _with_unit,
    "word": _word,
    "tuple": _tuple,
    "interval": _tuple,
    "list": _list,
    "equation": _equation,
}

"""Types of numbers and texts that a user gives, each with its bounds: one place for recipes, flags, suites and methods.

A bound is wide enough for every sensible use, and narrow enough that a slip (1e300, a forgotten value, a wrong unit) is
refused. A true or false never counts as a number, nor does a text, nor a fraction where a whole number is meant.
"""

from __future__ import annotations

import types
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.fields import FieldInfo

from thence.foreign_text import one_line
from thence.names import RULE, bad_name

MOST_SHOWN = 80
"""Characters of a value that an error shows."""


@dataclass(frozen=True)
class Says:
    """What a type takes, in words, where its bounds do not say it."""

    words: str


def _is_sampled(value: float) -> float:
    if 0 < value < 0.001:
        raise ValueError("a temperature is 0 (greedy) or at least 0.001")
    return value


def _is_name(value: str) -> str:
    if wrong := bad_name(value):
        raise ValueError(wrong)
    return value


def _is_place(value: str) -> str:
    if not value.strip():
        raise ValueError("the text is empty")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        raise ValueError("it holds a control character")
    if len(value.encode("utf-8")) > 4096:
        raise ValueError("it is longer than any path")
    return value


def _is_no_address(value: str) -> str:
    if "://" in value:
        raise ValueError("an address on the net is not read: download it, and give the path or the hub name")
    return value


def _is_whole_text(value: str) -> str:
    if any(unicodedata.category(character) == "Cs" for character in value):
        raise ValueError("it holds half a character (a lone surrogate)")
    return value


def _plainly_written(value: Any) -> Any:
    """A number where a text is meant, as its text: a column's value 3, an environment variable 4."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


# Whole numbers.
Count = Annotated[int, Ge(1), Le(10**9)]
Natural = Annotated[int, Ge(0), Le(10**9)]
Rows = Annotated[int, Ge(1), Le(10**6)]
"""What lies side by side or makes one batch: prompts, rollouts, samples, demonstrations."""
Steps = Annotated[int, Ge(1), Le(10**7)]
Tokens = Annotated[int, Ge(1), Le(10**7)]
"""Of one row, response or micro-batch."""
TokenBudget = Annotated[int, Ge(1), Le(10**15)]
"""Of a whole stage."""
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]
Processes = Annotated[int, Ge(1), Le(65_536)]
"""Ranks, threads, jobs, requests under way, micro-batches of one rank."""

# Numbers.
Rate = Annotated[float, Gt(0), Le(1e6)]
"""A learning rate. Rates that harm are told by the training itself; a number beyond these is no rate."""
Share = Annotated[float, Ge(0), Le(1)]
SomeShare = Annotated[float, Gt(0), Le(1)]
PartShare = Annotated[float, Ge(0), Lt(1)]
"""A share that is never the whole: AdamW's betas, a level, a smoothing."""
Coefficient = Annotated[float, Ge(0), Le(1e6)]
SomeCoefficient = Annotated[float, Gt(0), Le(1e6)]
Signed = Annotated[float, Ge(-1e6), Le(1e6)]
Epsilon = Annotated[float, Ge(1e-30), Le(1)]
"""Added to a divisor in float32."""
Ceiling = Annotated[float, Field(gt=1, allow_inf_nan=True), Says("a number above 1, or inf: off")]
"""A largest ratio; the one kind of number that may be infinite."""
Norm = Annotated[float, Ge(0), Le(1e12)]
Epochs = Annotated[float, Ge(1e-6), Le(1e6)]
Flops = Annotated[float, Gt(0), Le(1e28)]
Seconds = Annotated[float, Ge(0.001), Le(604_800)]
"""A time limit, at most a week."""
_SAMPLED = Says("0 (greedy) or a number from 0.001 to 100")
Temperature = Annotated[float, Ge(0), Le(100), AfterValidator(_is_sampled), _SAMPLED]
"""0 is greedy."""
SomeTemperature = Annotated[float, Ge(0.001), Le(100)]
Gigabytes = Annotated[float, Ge(0), Le(100_000)]

# Texts.
Text = Annotated[str, AfterValidator(_is_whole_text)]
"""Any text that can be written to a file."""
Written = Annotated[str, BeforeValidator(_plainly_written), AfterValidator(_is_whole_text)]
"""A text that may be given as a number."""
Name = Annotated[str, AfterValidator(_is_name), Says(f"a name; {RULE}")]
"""What becomes a file or folder: see :mod:`thence.names`."""
Place = Annotated[str, AfterValidator(_is_place), Says("a path or a name, in quotes")]
"""A path, a function of a file, or a name elsewhere: never empty, without control characters."""
_SOURCE = Says("a path or a hub name, in quotes")
Source = Annotated[str, AfterValidator(_is_place), AfterValidator(_is_no_address), _SOURCE]
"""A path or a hub name."""


def members_of(kind: Any) -> tuple[Any, ...]:
    """The types that an annotation allows, None apart."""
    if get_origin(kind) is Annotated:
        return members_of(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return tuple(inner for part in get_args(kind) if part is not type(None) for inner in members_of(part))
    return (kind,)


def whole_type(field: FieldInfo) -> Any:
    """The annotation of a field with its bounds, which pydantic keeps apart."""
    kind: Any = field.annotation
    for bound in field.metadata:
        kind = Annotated[kind, bound]
    return kind


def bounds_of(kind: Any) -> dict[str, float]:
    """The bounds of a number's type: ge, gt, le, lt. Of an optional one, those of the number."""
    return {
        name: getattr(mark, name) for mark in _marks(kind) for name in ("ge", "gt", "le", "lt") if hasattr(mark, name)
    }


def _marks(kind: Any) -> list[Any]:
    """What an annotation says beside the bare type."""
    if get_origin(kind) is Annotated:
        inner, *marks = get_args(kind)
        flat = [part for mark in marks for part in (mark.metadata if isinstance(mark, FieldInfo) else [mark])]
        return [*_marks(inner), *flat]
    if get_origin(kind) in (Union, types.UnionType):
        return [mark for part in get_args(kind) for mark in _marks(part)]
    return []


def takes(kind: Any) -> str:
    """What a field takes, in words: `a whole number from 1 to 10,000,000`, `true or false`."""
    if said := [mark.words for mark in _marks(kind) if isinstance(mark, Says)]:
        return said[-1]
    words = [_one(member, bounds_of(kind)) for member in members_of(kind)]
    return " or ".join(dict.fromkeys(word for word in words if word)) or "a value"


def _one(member: Any, bounds: Mapping[str, float]) -> str:
    if member is bool:
        return "true or false"
    if member in (int, float):
        return f"a {'whole ' if member is int else ''}number{_range(bounds)}"
    if member is str:
        return "a text in quotes"
    origin, inner = get_origin(member), get_args(member)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is list:
        return f"a list, each {takes(inner[0])}"
    if origin is tuple:
        held = [part for part in inner if part is not Ellipsis]
        count = "" if Ellipsis in inner else f" of {len(held)}"
        return f"a list{count}, each {takes(held[0])}"
    return "a table" if origin is dict or hasattr(member, "model_fields") else ""


def _range(bounds: Mapping[str, float]) -> str:
    low, high = "", ""
    if "ge" in bounds:
        low = f" from {_said(bounds['ge'])}"
    elif "gt" in bounds:
        low = f" above {_said(bounds['gt'])}"
    if "le" in bounds:
        joint = " to " if "ge" in bounds else ", at most " if low else " of at most "
        high = f"{joint}{_said(bounds['le'])}"
    elif "lt" in bounds:
        high = f"{', ' if low else ' '}below {_said(bounds['lt'])}"
    return low + high


def _said(number: float) -> str:
    return f"{int(number):,}" if number == int(number) and abs(number) < 1e15 else f"{number:g}"


def shown(value: Any) -> str:
    """A value as an error shows it: cut, on one line."""
    try:
        return one_line(repr(value), MOST_SHOWN)
    except (ValueError, RecursionError):  # a number of 5,000 digits, a table that is 10,000 deep
        return f"a {type(value).__name__} too long to show"

"""What the type of a field says: its members, its bounds, what lies at a path in it, and all this in words."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

_COUNTS = {2: "two", 3: "three"}


@dataclass(frozen=True)
class Says:
    """What a type takes, in words, where its bounds do not say it."""

    words: str


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


def type_at(kind: Any, path: Sequence[int | str]) -> Any:
    """The annotation of what lies at a path in a table, mapping or list; Any where it is not known."""
    for part in path:
        kind = _inner(kind, part)
    return kind


def _inner(kind: Any, part: int | str) -> Any:
    inner: Any = Any
    for member in members_of(kind):
        if part in fields_in(member):
            inner = whole_type(member.model_fields[part])
        elif (held := held_by(member)) and isinstance(part, int):
            inner = held[min(part, len(held) - 1)]
        elif get_origin(member) is dict:
            inner = get_args(member)[1]
    return inner


def fields_in(member: Any) -> Mapping[str, FieldInfo]:
    """The fields of a table's type; none of any other type."""
    return getattr(member, "model_fields", {})


def held_by(member: Any) -> list[Any]:
    """The types of what a list or tuple holds; none of any other type."""
    return [one for one in get_args(member) if one is not Ellipsis] if get_origin(member) in (list, tuple) else []


def about(kind: Any, path: Sequence[int | str]) -> tuple[str, str]:
    """The innermost field on a path that has a docstring, and what it says; two empty texts where there is none."""
    name = found = ""
    for place, part in enumerate(path):
        for member in members_of(type_at(kind, path[:place])):
            if part in fields_in(member):
                name, found = str(part), fields_in(member)[str(part)].description or ""
    return name, " ".join(found.split())


def takes(kind: Any, *, bare: bool = False) -> str:
    """What a field takes, in words: `a whole number from 1 to 10,000,000`, `true or false`.

    Args:
        bare: leave the bounds out: `a whole number`.
    """
    if said := [mark.words for mark in _marks(kind) if isinstance(mark, Says)]:
        return said[-1]
    bounds = {} if bare else bounds_of(kind)
    words = [_one(member, bounds, bare) for member in members_of(kind)]
    return " or ".join(dict.fromkeys(word for word in words if word)) or "a value"


def _one(member: Any, bounds: Mapping[str, float], bare: bool) -> str:
    if member is bool:
        return "true or false"
    if member in (int, float):
        return f"a {'whole ' if member is int else ''}number{_range(bounds)}"
    if member is str:
        return "a text in quotes"
    if get_origin(member) is Literal:
        return f"one of {', '.join(str(value) or '(empty)' for value in get_args(member))}"
    if held_by(member):
        return _list(member, bare)
    return "a table" if get_origin(member) is dict or fields_in(member) else ""


def _list(member: Any, bare: bool) -> str:
    held = held_by(member)
    counted = get_origin(member) is tuple and Ellipsis not in get_args(member)
    count = f"{_COUNTS.get(len(held), len(held))} " if counted else ""
    each = takes(held[0], bare=bare)
    whole, number, bounds = each.removeprefix("a ").partition("number")
    if number and whole in ("", "whole "):
        return f"a list of {count}{whole}numbers{bounds}"
    if bare and str in members_of(held[0]):
        return f"a list of {count}texts"
    listed = f"a list of {count.strip()}" if count else "a list"
    return listed if each == "a value" else f"{listed}, each {each}"


def _range(bounds: Mapping[str, float]) -> str:
    low, high = "", ""
    if "ge" in bounds:
        low = f" from {number_in_words(bounds['ge'])}"
    elif "gt" in bounds:
        low = f" above {number_in_words(bounds['gt'])}"
    if "le" in bounds:
        joint = " to " if "ge" in bounds else ", at most " if low else " of at most "
        high = f"{joint}{number_in_words(bounds['le'])}"
    elif "lt" in bounds:
        high = f"{', ' if low else ' '}below {number_in_words(bounds['lt'])}"
    return low + high


def number_in_words(number: float) -> str:
    """A bound as it is read: 10,000,000, or 1e-30."""
    if isinstance(number, int):
        return f"{number:,}"
    return f"{int(number):,}" if number == int(number) and abs(number) < 1e15 else f"{number:g}"


def fields_of(kind: Any, path: Sequence[int | str] = ()) -> list[str]:
    """The names of the fields of the table at a path in a section."""
    members = members_of(type_at(kind, path))
    return [name for member in members for name, field in fields_in(member).items() if not field.exclude]

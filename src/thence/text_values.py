"""Values that a user writes as text, on a command line, read by the type of the field that they are for."""

from __future__ import annotations

import datetime
import tomllib
import types
from collections.abc import Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel


def parse_value(text: str) -> Any:
    """A text as a TOML value; what is none (a path, a name) stays text, and so does a date, which no field takes."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, ValueError):  # ValueError: an integer with too many digits
        return text
    return text if isinstance(value, datetime.date | datetime.time) else value


def read_value(text: str, kind: Any) -> Any:
    """A text as the value of a field.

    A field for text takes any text as it stands (``2024-01-01``, ``1e5``, ``true``); a TOML string is read as one.
    Where a list of texts is wanted, a single text is a list of one.

    Args:
        kind: the field's annotation; Any where it is not known.
    """
    value = parse_value(text)
    members = members_of(kind)
    if isinstance(value, list) and any(get_origin(member) in (list, tuple) for member in members):
        return value
    if str in members:
        return value if isinstance(value, str) else text
    if list[str] in members:
        return [value if isinstance(value, str) else text]
    return value


def members_of(kind: Any) -> tuple[Any, ...]:
    """The types that an annotation allows, None apart."""
    if get_origin(kind) is Annotated:
        return members_of(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return tuple(inner for part in get_args(kind) if part is not type(None) for inner in members_of(part))
    return (kind,)


def field_type(kind: Any, path: Sequence[str]) -> Any:
    """The annotation of the field at a path below a section or a mapping; Any where it is not known."""
    for part in path:
        inner: Any = Any
        for member in members_of(kind):
            if isinstance(member, type) and issubclass(member, BaseModel) and part in member.model_fields:
                inner = member.model_fields[part].annotation
            elif get_origin(member) is dict:
                inner = get_args(member)[1]
        kind = inner
    return kind


def is_mapping(kind: Any) -> bool:
    """Whether an annotation allows a mapping with keys of the user's own."""
    return any(get_origin(member) is dict for member in members_of(kind))

"""Values that a user writes as text, on a command line, read by the type of the field that they are for."""

from __future__ import annotations

import datetime
from typing import Any, get_args, get_origin

from thence.settings.annotations import held_by, members_of
from thence.toml import NotTomlError, parse_toml


def parse_value(text: str) -> Any:
    """A text as a TOML value; what is none (a path, a name) stays text, and so does a date, which no field takes."""
    try:
        tables = parse_toml(f"value = {text}")
    except NotTomlError:
        return text
    value = tables["value"]
    return text if len(tables) > 1 or isinstance(value, datetime.date | datetime.time) else value


def read_value(text: str, kind: Any) -> Any:
    """A text as the value of a field.

    A field for text takes any text as it stands (``2024-01-01``, ``1e5``, ``true``); a TOML string is read as one.
    Where a list is wanted, a single value is a list of one; numbers may stand with commas between: ``0.9,0.95``.

    Args:
        kind: the field's annotation; Any where it is not known.
    """
    value = parse_value(text)
    members = members_of(kind)
    if isinstance(value, list) and any(get_origin(member) in (list, tuple) for member in members):
        return value
    if str in members:
        return value if isinstance(value, str) else text
    if "," in text and any({int, float} >= set(members_of(held_by(m)[0])) for m in members if held_by(m)):
        listed = parse_value(f"[{text}]")
        return listed if isinstance(listed, list) else value
    lists = [get_args(member)[0] for member in members if get_origin(member) is list]
    if lists and value != "":
        return [value if isinstance(value, str) or str not in members_of(lists[0]) else text]
    return value


def is_mapping(kind: Any) -> bool:
    """Whether an annotation allows a mapping with keys of the user's own."""
    return any(get_origin(member) is dict for member in members_of(kind))


def is_switch(kind: Any) -> bool:
    """Whether a field may be true or false, so that its flag needs no value."""
    return bool in members_of(kind)

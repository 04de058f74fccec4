"""Counts, values of JSON and TOML, durations and shares, as a user would say them."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from typing import Any

from thence.foreign_text import one_line

MOST_SHOWN = 80
"""Characters of a value that an error shows."""


def counted(count: int, thing: str, things: str | None = None) -> str:
    """A count with its thing, "1 step" or "1,200 steps". ``things`` is an irregular plural."""
    return f"{count:,} {thing if count == 1 else things or thing + 's'}"


def json_kind(value: Any) -> str:
    """What kind of value this is: "a list", "text", "a whole number"."""
    match value:
        case None:
            return "nothing (null)"
        case bool():
            return str(value).lower()
        case int():
            return "a whole number"
        case float():
            return "a number"
        case str():
            return "text"
        case dict():
            return "an object"
        case list() | tuple():
            return "a list"
    return f"a {type(value).__name__}"


def shown(value: Any) -> str:
    """A value as an error shows it: as TOML writes it, on one line, cut, whatever it is."""
    try:
        return one_line(_written(value), MOST_SHOWN)
    except (ValueError, RecursionError):  # a number of 5,000 digits, a table that is 10,000 deep
        return f"{json_kind(value)} too long to show"


def _written(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key} = {_written(inner)}' for key, inner in value.items())}}}"
    return repr(value)


def duration(seconds: float) -> str:
    """A time that something took or will take: `1.5 s`, `42 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds < 10:
        return f"{round(seconds, 1):g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def percent(share: float) -> str:
    """A share in per cent; one decimal where it is small but not nothing."""
    if math.isnan(share):
        return "–"
    return f"{share:.1%}" if 0.0005 <= share < 0.0995 else f"{share:.0%}"

"""Words for counts and for values of JSON and TOML, as a user would say them."""

from __future__ import annotations

from typing import Any


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

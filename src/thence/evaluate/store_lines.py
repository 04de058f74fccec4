"""Lines of an evaluation's store as dataclasses: what a line must hold is what its class says."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Strict, TypeAdapter, ValidationError

from thence.jsonl import read_lines, say_bad_lines
from thence.wording import json_kind

Line = TypeVar("Line")
Whole = Annotated[int, Strict()]
"""A whole number, not one written as text."""


def read_store_lines(path: Path, kind: type[Line], what_follows: str) -> list[Line]:
    """The lines of a file. Those that cannot be read, or lack something, are named in the log and left out.

    Args:
        kind: class of a line; other keys of a line are ignored.
        what_follows: what becomes of a line that is left out, for the log.
    """
    found = read_lines(path, wrong_with(kind))
    say_bad_lines(path, found.bad, what_follows)
    return [_adapter(kind).validate_python(line) for line in found.values]


@cache
def wrong_with(kind: type) -> Callable[[dict[str, Any]], str | None]:
    """What says why an object is no line of this class; None: it is one."""

    def why(line: dict[str, Any]) -> str | None:
        try:
            _adapter(kind).validate_python(line)
        except ValidationError as error:
            return _said(error)
        return None

    return why


@cache
def _adapter(kind: type[Line]) -> TypeAdapter[Line]:
    return TypeAdapter(kind)


def _said(error: ValidationError) -> str:
    """The first thing that is wrong."""
    found = error.errors(include_url=False, include_context=False)[0]
    name, value = found["loc"][0], found["input"]
    if found["type"] == "missing" and len(found["loc"]) == 1:
        return f"it lacks {name}"
    if found["type"] == "literal_error" and isinstance(value, str):
        return f"no such {name}: {value[:40]!r}"
    return f"{name} {'is' if len(found['loc']) == 1 else 'holds'} {json_kind(value)}"

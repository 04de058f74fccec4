"""Checks of single fields of a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thence.data.problems import RowProblem
from thence.wording import json_kind


def need(row: Mapping[str, Any], field: str) -> Any:
    """The value of a field that has to be there. Raises RowProblem."""
    value = row.get(field)
    if value is None:
        raise RowProblem(field, "missing or null", f"fill the field, or name its column: --data.columns {field}=COLUMN")
    return value


def text(value: object, field: str, *, may_be_empty: bool = False) -> str:
    """`value` if it is clean text. Raises RowProblem."""
    if not isinstance(value, str):
        raise wrong_type(field, value, "text")
    if not may_be_empty and not value.strip():
        raise RowProblem(field, "empty", "fill the field")
    if "\0" in value:
        raise RowProblem(field, f"NUL character at position {value.index(chr(0))}", "remove it from the text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowProblem(
            field, f"invalid Unicode (half of a surrogate pair) at position {error.start}", "fix the text's encoding"
        ) from None
    return value


def wrong_type(field: str, value: object, wanted: str) -> RowProblem:
    """The problem of a value of the wrong type."""
    return RowProblem(field, f"expected {wanted}, found {json_kind(value)}", f"make it {wanted}")


def absent(value: object) -> bool:
    """Whether a value says nothing: readers of Parquet fill fields that a row does not have with null."""
    return value is None or value in ("", [], {}, ())

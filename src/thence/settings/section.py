"""The base of tables of settings: strict about types. `validation` makes such a table of plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from thence.settings.annotations import members_of
from thence.settings.validation import DEEPEST
from thence.wording import shown

LARGEST = 2**53
"""Whole numbers up to here mean the same in every program that reads them."""


class Section(BaseModel):
    """A table of settings: immutable, an unknown key is an error, and no value is taken for one of another type.

    True is no number, "8" and 8.0 are not 8, and nan and inf are no numbers at all.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_type(cls, value: Any, info: ValidationInfo) -> Any:
        members = members_of(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, list) and any(get_origin(member) is tuple for member in members):
            return tuple(value)
        if isinstance(value, Mapping) and any(get_origin(member) is dict for member in members):
            check_plain(value, info.field_name or "")
        return value


class PlainValueError(ValueError):
    """A value that no file can hold or that means nothing, with its place in its table."""

    def __init__(self, problem: str, path: tuple[str, ...]):
        super().__init__(problem)
        self.path = path


def check_plain(value: Any, inside: str = "", path: tuple[str, ...] = ()) -> None:
    """Refuse values that cannot be written to a file or mean nothing: nan, huge numbers, deep nesting.

    Args:
        inside: the table that holds the value. An option of a method may be inf, where the method says so itself.
        path: the keys that led here.

    Raises:
        PlainValueError: there is one, at any depth.
    """
    if len(path) > DEEPEST:
        raise PlainValueError(f"tables and lists lie more than {DEEPEST} deep in each other", path[:1])
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise PlainValueError(f"the key {shown(key)} is no text", path)
            check_plain(inner, key if isinstance(inner, Mapping) else inside, (*path, key))
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            check_plain(inner, inside, (*path, str(place)))
    elif isinstance(value, float) and not math.isfinite(value) and not (inside == "options" and value == math.inf):
        raise PlainValueError(f"{value} is no number", path)
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST:
        raise PlainValueError(f"{shown(value)} is beyond every sensible number", path)

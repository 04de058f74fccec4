"""Tables of settings: strict about types, and refused with file, line, field, value and remedy."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from thence.errors import RecipeError
from thence.limits import members_of, shown, takes, whole_type
from thence.toml import TomlFile

T = TypeVar("T", bound=BaseModel)
DEEPEST = 32
"""Tables within tables, in a mapping with keys of the user's own."""
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
        if isinstance(value, bool) and not {bool, Any} & set(members) and all(_is_plain(member) for member in members):
            raise ValueError(f"{str(value).lower()} is no value of this field")
        if isinstance(value, list) and any(get_origin(member) is tuple for member in members):
            return tuple(value)
        if isinstance(value, Mapping) and any(get_origin(member) is dict for member in members):
            check_plain(value, info.field_name or "")
        return value


def _is_plain(member: Any) -> bool:
    return member in (int, float, str) or get_origin(member) is Literal


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


def validated(
    kind: type[T],
    values: Mapping[str, Any],
    where: str = "",
    *,
    file: TomlFile | str | None = None,
    under: str = "",
    known: Sequence[str] = (),
    remedy: str = "",
) -> T:
    """A section made of plain values.

    Args:
        where: the table's dotted name, for the error.
        file: the file that the values come from.
        under: another table of the file in which they may stand.
        known: further keys that may be meant by an unknown one.
        remedy: what else to say where a field is wrong.

    Raises:
        RecipeError: an unknown key, a missing one, or a value that a field does not take.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise refusal(error, kind, where, file=file, under=under, known=known, remedy=remedy) from None
    except RecursionError:
        raise RecipeError(
            "the tables lie too deep in each other",
            remedy=f"nest at most {DEEPEST}",
            file=_path(file),
            field=where or None,
        ) from None


def refusal(
    error: ValidationError,
    kind: Any,
    where: str = "",
    *,
    file: TomlFile | str | None = None,
    under: str = "",
    known: Sequence[str] = (),
    remedy: str = "",
    names: Mapping[int, str] | None = None,
) -> RecipeError:
    """The first error of a validation, with its place, the value and what the field takes.

    Args:
        names: what to call the tables of a list, instead of their numbers.
    """
    first = error.errors(include_url=False)[0]
    path = [part for part in first["loc"] if not (isinstance(part, str) and "[" in part)]
    path += getattr(first.get("ctx", {}).get("error"), "path", ())
    called = [
        names.get(part, str(part + 1)) if names is not None and isinstance(part, int) else str(part) for part in path
    ]
    field = ".".join([where, *called] if where else called)
    line = file.line_of(*_written_at(path, where, under)) if isinstance(file, TomlFile) else None
    if first["type"] == "extra_forbidden":
        fields = fields_of(kind, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), [*fields, *known], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"fields are: {', '.join(fields)}"
        hint += f"; {remedy}" if remedy else ""
        return RecipeError("unknown key", remedy=hint, file=_path(file), line=line, field=field)
    return RecipeError(
        _problem(first),
        remedy=_remedy(first, kind, path, remedy),
        file=_path(file),
        line=line,
        field=field or None,
    )


def _written_at(path: Sequence[int | str], where: str, under: str) -> list[str]:
    """The dotted names under which a field may stand in a file."""
    named = [str(part) for part in path]
    while named and named[-1].isdecimal():  # the member of a list stands on the list's line
        named.pop()
    tables = [where, under] if under else [where]
    full = [".".join([table, *named]).strip(".") for table in tables]
    return [*full, f"defaults.{'.'.join(named[2:])}"] if named[:1] == ["tasks"] else full


def _problem(first: ErrorDetails) -> str:
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return "the field is missing"
    whole = first["type"] == "value_error" and isinstance(first["input"], Mapping)  # of a table, which says enough
    value = shown(first["input"])
    return said if whole or value in said else f"{said} (got {value})"


def _remedy(first: ErrorDetails, kind: Any, path: Sequence[int | str], more: str) -> str:
    if "[key]" in first["loc"]:
        keys = [get_args(member)[0] for member in members_of(_type_at(kind, path[:-1])) if get_origin(member) is dict]
        return f"give the table {takes(keys[0]) if keys else 'another name'}"
    field = _field_at(kind, path)
    if field is None:
        return more or "fix this table"
    about, what = field
    if first["type"] == "value_error" and isinstance(first["input"], Mapping):
        return more or "fix this table"
    described = f"; {path[-1]}: {' '.join(about.split())}" if about else ""
    return f"give {what}{described}" + (f"; {more}" if more else "")


def _field_at(kind: Any, path: Sequence[int | str]) -> tuple[str, str] | None:
    """What the field at a path is for, and what it takes."""
    about, found = "", None
    for part in path:
        inner = None
        for member in members_of(kind):
            fields = getattr(member, "model_fields", {})
            if part in fields:
                inner, about = whole_type(fields[part]), fields[part].description or ""
            elif get_origin(member) in (list, tuple) and isinstance(part, int):
                held = [one for one in get_args(member) if one is not Ellipsis]
                inner = held[min(part, len(held) - 1)]
            elif get_origin(member) is dict:
                inner = get_args(member)[1]
        if inner is None:
            return None
        kind = found = inner
    return None if found is None else (about, takes(found))


def _type_at(kind: Any, path: Sequence[int | str]) -> Any:
    for part in path:
        kind = next((whole_type(m.model_fields[part]) for m in members_of(kind) if part in m.model_fields), Any)
    return kind


def fields_of(kind: Any, path: Sequence[int | str]) -> list[str]:
    """The names of the fields of the table at a path in a section."""
    for part in path:
        inner = None
        for member in members_of(kind):
            if part in getattr(member, "model_fields", {}):
                inner = member.model_fields[part].annotation
            elif get_origin(member) in (list, tuple, dict):
                inner = get_args(member)[-1] if get_args(member)[-1] is not Ellipsis else get_args(member)[0]
        if inner is None:
            return []
        kind = inner
    sections = [member for member in members_of(kind) if hasattr(member, "model_fields")]
    return [name for section in sections for name, field in section.model_fields.items() if not field.exclude]


def _path(file: TomlFile | str | None) -> str | None:
    return str(file.path) if isinstance(file, TomlFile) else file

"""Plain values made into a section of settings, or refused in the user's words: the one place that does it.

An error names the file and line, the field as the user wrote it, the value, the rule that it breaks, and what the field
takes. No word of pydantic's or Python's types is in it.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from thence.errors import RecipeError
from thence.settings.annotations import (
    about,
    fields_in,
    fields_of,
    held_by,
    members_of,
    number_in_words,
    takes,
    type_at,
)
from thence.settings.toml_file import TomlFile
from thence.wording import shown

T = TypeVar("T")
DEEPEST = 32
"""Tables within tables, in a mapping with keys of the user's own."""
_BOUNDS = {
    "greater_than": ("must be above", "gt"),
    "greater_than_equal": ("must be at least", "ge"),
    "less_than": ("must be below", "lt"),
    "less_than_equal": ("must be at most", "le"),
}
_SORTS = {"int": "a whole number", "float": "a number", "string": "a text", "bool": "true or false"}
_SORTS |= {"list": "a list", "tuple": "a list"}
_PLACES = ("first", "second", "third", "fourth", "fifth")


def validated(
    kind: type[T],
    values: Any,
    where: str = "",
    *,
    file: TomlFile | str | None = None,
    under: str = "",
    own: Collection[str] | None = None,
    known: Sequence[str] = (),
    remedy: str = "",
    names: Mapping[int, str] | None = None,
    strict: bool = True,
) -> T:
    """Plain values as a section, a dataclass, or any other type of :mod:`thence.settings.limits`.

    Args:
        where: the dotted name of the table or field, for the error.
        file: the file that the values come from.
        under: another table in which they may stand.
        own: the fields that stand in the table itself; others stand under ``under``. None: not known.
        known: further keys that may be meant by an unknown one.
        remedy: what else to say where a field is wrong.
        names: what to call the tables of a list, instead of their numbers.
        strict: no value is taken for one of another type; False: a list is a tuple too, as JSON has it.

    Raises:
        RecipeError: an unknown key, a missing one, or a value that a field does not take.
    """
    try:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind.model_validate(values)
        return TypeAdapter(kind).validate_python(values, strict=strict)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
    except RecursionError:
        problem, deep = "the tables lie too deep in each other", f"nest at most {DEEPEST}"
        raise RecipeError(problem, remedy=deep, file=_path(file), field=where or None) from None
    path = _place_of(found)
    written = under if under and own is not None and path and path[0] not in own else where
    named = _named(kind, path)
    line = file.line_of(*_written_at(named, where, under)) if isinstance(file, TomlFile) else None
    problem, what_to_do = _refusal(found, kind, path, [*known], remedy)
    called = [(names or {}).get(part, str(part + 1)) if isinstance(part, int) else part for part in named]
    field = ".".join([written, *called] if written else called)
    raise RecipeError(problem, remedy=what_to_do, file=_path(file), line=line, field=field or None)


def _place_of(found: ErrorDetails) -> list[int | str]:
    """The path to the wrong value. What pydantic writes in brackets is the member of a union or `[key]`."""
    path = [part for part in found["loc"] if not (isinstance(part, str) and "[" in part)]
    return path + [
        int(part) if part.isdecimal() else part for part in getattr(found.get("ctx", {}).get("error"), "path", ())
    ]


def _named(kind: Any, path: Sequence[int | str]) -> list[int | str]:
    """The path to the field: the members of a list of values have no names, and errors count them."""
    named = list(path)
    while named and isinstance(named[-1], int) and not any(map(fields_in, members_of(type_at(kind, named)))):
        named.pop()
    return named


def _written_at(named: Sequence[int | str], where: str, under: str) -> list[str]:
    """The dotted names under which a field may stand in a file."""
    texts = [str(part) for part in named]
    tables = [where, under] if under else [where]
    full = [".".join([table, *texts]).strip(".") for table in tables]
    return [*full, f"defaults.{'.'.join(texts[2:])}"] if texts[:1] == ["tasks"] else full


def _refusal(
    found: ErrorDetails, kind: Any, path: Sequence[int | str], known: Sequence[str], more: str
) -> tuple[str, str]:
    """The problem and the remedy."""
    also = f"; {more}" if more else ""
    if found["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        fields = fields_of(kind, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), [*fields, *known], n=1)
        return "unknown key", (f"did you mean {near[0]!r}?" if near else f"fields are: {', '.join(fields)}") + also
    if "[key]" in found["loc"]:
        keys = [get_args(member)[0] for member in members_of(type_at(kind, path[:-1])) if get_origin(member) is dict]
        return _problem(found, str, ()), f"give the table {takes(keys[0]) if keys else 'another name'}"
    if found["type"] == "value_error" and isinstance(found["input"], Mapping):  # of a whole table
        whole = not hasattr(found.get("ctx", {}).get("error"), "path")
        return _problem(found, kind, path), more or f"fix this {'table' if whole else 'value'}"
    named = _named(kind, path)
    whole, (name, what_for) = type_at(kind, named), about(kind, named)
    described = f"; {name}: {what_for.removesuffix('.') if more else what_for}" if what_for else ""
    return _problem(found, kind, path), f"give {takes(whole)}{_example(whole)}{described}{also}"


def _problem(found: ErrorDetails, kind: Any, path: Sequence[int | str]) -> str:
    """What is wrong with the value, in words; which one it is where it lies in a list."""
    named, value = _named(kind, path), shown(found["input"])
    count = len(path) - len(named)
    if found["type"] in ("missing", "too_short", "too_long") and not (found["type"] == "missing" and not count):
        return _wrong_length(found, kind, named)
    if found["type"] == "missing":
        return "the field is missing"
    subject = ""
    if count:
        place = int(path[-count])
        subject = f"the {_PLACES[place]} value " if place < len(_PLACES) else f"value {place + 1} "
    if found["type"] == "value_error":
        said = found["msg"].removeprefix("Value error, ")
        plain = isinstance(found["input"], Mapping) or value in said or not str(found["input"]).strip()
        said = f"{subject.rstrip()}: {said}" if subject else said
        return said if plain else f"{said} (got {value})"
    limits = found.get("ctx", {})
    if found["type"] in _BOUNDS:
        rule, name = _BOUNDS[found["type"]]
        return f"{subject}{rule} {number_in_words(limits[name])}, not {value}"
    if found["type"] == "finite_number":
        return f"{subject}must be a finite number, not {value}"
    if found["type"] == "string_pattern_mismatch":
        return f"{subject}must match {limits['pattern']}, not {value}"
    # of a dataclass no more is known than what pydantic found wrong
    what = takes(at, bare=True) if (at := type_at(kind, path)) is not Any else _SORTS.get(found["type"].split("_")[0])
    return f"{subject}must be {what or 'a table'}, not {value}"


def _wrong_length(found: ErrorDetails, kind: Any, named: Sequence[int | str]) -> str:
    """Of a list with too many values or too few."""
    at = type_at(kind, named)
    values = found["input"]
    if any(get_origin(member) is tuple and Ellipsis not in get_args(member) for member in members_of(at)):
        return f"must be {takes(at, bare=True)}, not {shown(values)}"
    least = found.get("ctx", {}).get("min_length", 1)
    what = "table" if isinstance(values, Mapping) else "list"
    return f"the {what} is empty" if not values else f"must hold at least {least}, not {len(values)}"


def _example(kind: Any) -> str:
    """How a list of numbers is written."""
    for held in filter(None, map(held_by, members_of(kind))):
        if {int, float} >= set(members_of(held[0])):
            values = ("1", "2") if int in members_of(held[0]) else ("0.9", "0.95")
            return f", written {','.join(values)} on the command line or [{', '.join(values)}] in TOML"
    return ""


def _path(file: TomlFile | str | None) -> str | None:
    return str(file.path) if isinstance(file, TomlFile) else file

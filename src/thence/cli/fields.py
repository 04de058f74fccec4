"""Dotted flags: ``--sft.lr 2e-5`` and ``--data.skip-bad`` as overrides of a recipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Sequence
from typing import Any, get_origin

from pydantic import BaseModel

from thence.errors import UserError
from thence.recipe import KINDS, Data, Lora, Model, Recipe, Sharding, Trackers, type_of
from thence.settings.annotations import members_of, takes
from thence.settings.text_values import is_mapping, is_switch

_FIRST = {"model": "path", "data": "source"}
_ENTRY = re.compile(r"\s*([\w.-]+)=(.*)", re.DOTALL)


def take_fields(arguments: Sequence[str], own: Container[str] = ()) -> tuple[list[str], dict[str, Any]]:
    """Take the flags that are fields of a recipe out of a command line.

    Args:
        own: flags that the command has itself, with their dashes; they stay.

    Returns:
        What is left, in order, and overrides. A flag without a value means true, for fields that are true or false;
        every other one needs a value. A flag of a field that is a table takes ``KEY=VALUE``, several of them with
        commas between or the flag repeated.

    Raises:
        UserError: a field without a value, with an empty one, or given twice.
    """
    rest, left = [], list(arguments)
    overrides: dict[str, Any] = {}
    named: dict[str, str] = {}
    while left:
        argument = left.pop(0)
        flag, equals, value = argument.partition("=")
        if flag in own or not _is_field(flag):
            rest.append(argument)
            continue
        kind = type_of(flag[2:])
        if not equals:
            value = _value(flag, kind, left)
        if not value.strip() and not (str in members_of(kind) or kind is Any):
            raise UserError(
                "the value is empty", remedy=f"give {_takes(flag, kind)}, or leave the flag out", field=flag
            )
        for name, part in _entries(flag[2:], value).items():
            same = name.replace("-", "_")
            if same in named:
                problem = f"the field is given twice ({overrides[named[same]]}, {part})"
                raise UserError(problem, remedy="give it once", field=f"--{name}")
            named[same] = name
            overrides[name] = part
    return rest, overrides


def _is_field(flag: str) -> bool:
    """Whether there can be a field of this name. Raises UserError where it is a table."""
    if not flag.startswith("--") or "." in flag:
        return flag.startswith("--")
    plain = flag[2:].replace("-", "_")
    if plain in _FIRST:
        raise UserError(f"{plain} is a table", remedy=f"name a field: --{plain}.{_FIRST[plain]}", field=flag)
    return plain in Recipe.model_fields and plain != "tables"


def _value(flag: str, kind: Any, left: list[str]) -> str:
    """The value of a flag, taken off what follows it."""
    if is_switch(kind):
        counts = int in members_of(kind)
        own = left and (left[0] in ("true", "false") or (counts and left[0].isdecimal()))
        return left.pop(0) if own else "true"
    if not left or left[0].startswith("--"):
        more = f"; a value that begins with dashes is written {flag}=VALUE" if left else ""
        raise UserError("the flag needs a value", remedy=f"give {_takes(flag, kind)}{more}", field=flag)
    return left.pop(0)


def _takes(flag: str, kind: Any) -> str:
    lists = any(get_origin(member) is list for member in members_of(kind))
    return f"""{takes(kind)}: {flag} '["A", "B"]'""" if lists else takes(kind)


def _entries(name: str, value: str) -> dict[str, str]:
    """What a flag sets: its field, or the entries of its field where that is a table and the value says KEY=VALUE."""
    if is_mapping(type_of(name)):
        found = [_ENTRY.fullmatch(part) for part in re.split(r",(?=\s*[\w.-]+=)", value)]
        if all(found):
            return {f"{name}.{entry[1]}": entry[2] for entry in found if entry}
    return {name: value}


def field_flags() -> list[str]:
    """The flag of every field of a recipe, the tables of its stages by the names of their kinds."""
    return [_flag(table, name) for table, section in _tables().items() for name in _names(table, section)]


def describe_fields() -> str:
    """Every field of a recipe with its type, default and meaning, as text."""
    lines = []
    for table, section in _tables().items():
        lines.append(f"\n[{table}]" if table else "at the top of the file")
        lines += describe_section(section, lambda name, table=table: _flag(table, name), _names(table, section))
    return "\n".join(lines)


def describe_section(
    section: type[BaseModel], named: Callable[[str], str] = str, names: Sequence[str] | None = None
) -> list[str]:
    """The fields of one table, a line each.

    Args:
        named: how a field is written.
        names: which fields; None: all.
    """
    lines = []
    for name in section.model_fields if names is None else names:
        field = section.model_fields[name]
        if not field.exclude:
            default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
            lines.append(f"  {named(name):<32} {default:<14} {' '.join((field.description or '').split())}")
    return lines


def _tables() -> dict[str, type[BaseModel]]:
    return {
        "": Recipe,
        "model": Model,
        "model.lora": Lora,
        "data": Data,
        "sharding": Sharding,
        "trackers": Trackers,
        **KINDS,
    }


def _names(table: str, section: type[BaseModel]) -> list[str]:
    own = {name for name in section.model_fields if (f"{table}.{name}" if table else name) in _tables()}  # tables
    return [name for name, field in section.model_fields.items() if not field.exclude and name not in own]


def _flag(table: str, name: str) -> str:
    return (f"--{table}.{name}" if table else f"--{name}").replace("_", "-")

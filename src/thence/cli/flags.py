"""Dotted flags: ``--sft.lr 2e-5`` and ``--data.skip-bad`` as overrides of a recipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_origin

from pydantic import BaseModel

from thence.cli.arguments import SWITCH, Option, take_apart
from thence.errors import UserError
from thence.recipe import KINDS, Data, Model, Recipe, type_of
from thence.settings.annotations import members_of, takes
from thence.settings.text_values import is_mapping, is_switch

_FIRST = {"model": "path", "data": "source"}
_ENTRY = re.compile(r"\s*([\w.-]+)=(.*)", re.DOTALL)


def split_flags(
    arguments: Sequence[str], switches: Sequence[str], aliases: Mapping[str, str] | None = None
) -> tuple[list[str], set[str], dict[str, Any]]:
    """Take a command line apart whose flags are the fields of a recipe.

    Args:
        switches: flags without a value, with their dashes.
        aliases: other names of flags, with their dashes.

    Returns:
        Positional arguments, the switches that are on (``--help`` alone where it was asked for), and overrides. A flag
        without a value means true, for fields that are true or false; every other one needs a value. A flag of a field
        that is a table takes ``KEY=VALUE``, several of them with commas between or the flag repeated.

    Raises:
        UserError: a flag that is neither a switch nor a field, without a value, with an empty one, or given twice.
    """
    found = take_apart(arguments, dict.fromkeys(switches, SWITCH), _field, aliases)
    if found.help:
        return [], {"--help"}, {}
    overrides: dict[str, Any] = {}
    named: dict[str, str] = {}
    for flag, values in found.given.items():
        for value in values if flag not in switches else ():
            for name, part in _entries(flag[2:], value).items():
                same = name.replace("-", "_")
                if same in named:
                    problem = f"the field is given twice ({overrides[named[same]]}, {part})"
                    raise UserError(problem, remedy="give it once", field=f"--{name}")
                named[same] = name
                overrides[name] = part
    return found.positional, {flag for flag in found.given if flag in switches}, overrides


def _field(flag: str) -> Option | None:
    """What the flag of a field takes; None where there can be no such field."""
    name = flag[2:]
    if "." not in name:
        plain = name.replace("-", "_")
        if plain not in Recipe.model_fields or plain == "tables":
            return None
        if plain in _FIRST:
            raise UserError(f"{plain} is a table", remedy=f"name a field: --{plain}.{_FIRST[plain]}", field=flag)
    kind = type_of(name)
    if is_switch(kind):
        return Option(lone="true", words="true or false")
    lists = any(get_origin(member) is list for member in members_of(kind))
    words = f"""{takes(kind)}: {flag} '["A", "B"]'""" if lists else takes(kind)
    return Option(repeated=is_mapping(kind), empty=str in members_of(kind) or kind is Any, words=words)


def _entries(name: str, value: str) -> dict[str, str]:
    """What a flag sets: its field, or the entries of its field where that is a table and the value says KEY=VALUE."""
    if is_mapping(type_of(name)):
        found = [_ENTRY.fullmatch(part) for part in re.split(r",(?=\s*[\w.-]+=)", value)]
        if all(found):
            return {f"{name}.{entry[1]}": entry[2] for entry in found if entry}
    return {name: value}


def describe_fields() -> str:
    """Every field of a recipe with its type, default and meaning, as text."""
    tables = {"": Recipe, "model": Model, "data": Data, **KINDS}
    lines = []
    for table, section in tables.items():
        lines.append(f"\n[{table}]" if table else "at the top of the file")
        lines += _fields(section, table)
    return "\n".join(lines)


def describe_section(section: type[BaseModel], named: Callable[[str], str] = str) -> list[str]:
    """The fields of one table, a line each.

    Args:
        named: how a field is written.
    """
    lines = []
    for name, field in section.model_fields.items():
        if not field.exclude:
            default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
            lines.append(f"  {named(name):<32} {default:<14} {' '.join((field.description or '').split())}")
    return lines


def _fields(section: type[BaseModel], table: str) -> list[str]:
    def flag(name: str) -> str:
        return (f"--{table}.{name}" if table else f"--{name}").replace("_", "-")

    lines = describe_section(section, flag)
    return lines if table else [line for line in lines if line.split()[0] not in ("--model", "--data")]

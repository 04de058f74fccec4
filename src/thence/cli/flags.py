"""Dotted flags: ``--sft.lr 2e-5`` and ``--data.skip-bad`` as overrides of a recipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel

from thence.errors import RecipeError
from thence.recipe import KINDS, Data, Model, Recipe, type_of
from thence.text_values import is_mapping

_ENTRY = re.compile(r"\s*([\w.-]+)=(.*)", re.DOTALL)


def split_flags(arguments: Sequence[str], switches: Sequence[str]) -> tuple[list[str], set[str], dict[str, Any]]:
    """Take a command line apart.

    Args:
        switches: flags without a value, with their dashes.

    Returns:
        Positional arguments, the switches that are on, and overrides. A dotted flag without a value means True. A flag
        of a field that is a table takes ``KEY=VALUE``, several of them with commas between or the flag repeated.

    Raises:
        RecipeError: a flag that is neither a switch nor a field.
    """
    positional: list[str] = []
    on: set[str] = set()
    overrides: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument in switches:
            on.add(argument)
        elif argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            if "." not in name and name.replace("-", "_") not in Recipe.model_fields:
                raise RecipeError(
                    "no such flag", remedy="fields are written --table.field, for example --sft.lr 2e-5", field=argument
                )
            if not equals:
                has_value = bool(rest) and not rest[0].startswith("--")
                value = rest.pop(0) if has_value else True
            overrides |= _entries(name, value)
        else:
            positional.append(argument)
    return positional, on, overrides


def _entries(name: str, value: str | bool) -> dict[str, Any]:
    """What a flag sets: its field, or the entries of its field where that is a table and the value says KEY=VALUE."""
    if isinstance(value, str) and is_mapping(type_of(name)):
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

"""Taking a command line apart, the same way for every command.

A flag is given once, with a value that is not empty, as ``--flag VALUE`` or ``--flag=VALUE``; a switch stands alone.
What is forgotten, doubled or mistyped is refused with the flag's name and what it takes.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from thence.errors import UserError
from thence.settings.annotations import takes
from thence.settings.text_values import read_value
from thence.wording import shown

HELP_FLAGS = ("-h", "--help")
_DASHES = "‐‑‒–—―−﹣－"
_NUMBER = re.compile(r"-(?:\d|\.\d|inf|nan)", re.IGNORECASE)


@dataclass(frozen=True)
class Option:
    """A flag of a command.

    Args:
        values: how many it takes; 0: a switch.
        lone: what it means without a value, where it may stand so.
        repeated: it may be given several times.
        empty: its value may be empty.
        words: what it takes, for errors.
    """

    values: int = 1
    lone: str | None = None
    repeated: bool = False
    empty: bool = False
    words: str = "a value"


SWITCH = Option(0)


@dataclass
class Arguments:
    """A command line in parts.

    Args:
        positional: what stands without a flag, in order.
        given: the values of every flag, as text, in order; those of one that was repeated follow each other.
        help: help was asked for.
    """

    positional: list[str] = field(default_factory=list)
    given: dict[str, list[str]] = field(default_factory=dict)
    help: bool = False

    def value(self, flag: str) -> str | None:
        """The value of a flag; None where it was not given."""
        return self.given[flag][0] if flag in self.given else None


def take_apart(
    argv: Sequence[str],
    options: Mapping[str, Option],
    other: Callable[[str], Option | None] = lambda name: None,
    aliases: Mapping[str, str] | None = None,
) -> Arguments:
    """Take a command line apart.

    Args:
        options: flags by name, dashes included.
        other: what a flag takes that is not among them; None: there is no such flag.
        aliases: other names of flags.

    Raises:
        UserError: an unknown flag, one without a value, with an empty one, or given twice.
    """
    found, rest = Arguments(), list(argv)
    if any(argument in HELP_FLAGS for argument in argv):
        found.help = True
        return found
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            _check_positional(argument)
            found.positional.append(argument)
            continue
        name, equals, value = argument.partition("=")
        name = (aliases or {}).get(name, name)
        option = options.get(name) or other(name)
        if option is None:
            raise _unknown(name, options)
        values = [value] if equals else _values(name, option, rest)
        if equals and option.values != 1:
            words = "stands alone" if option.values == 0 else f"takes {option.values} values: {name} A B"
            raise UserError(f"the flag {words}", remedy="leave out the = and what follows it", field=name)
        if not option.empty and any(not one.strip() for one in values):
            raise UserError("the value is empty", remedy=f"give {option.words}, or leave the flag out", field=name)
        if name in found.given and not option.repeated:
            raise UserError(
                f"the flag is given twice ({', '.join([*found.given[name], *values]) or 'a switch'})",
                remedy="give it once",
                field=name,
            )
        found.given.setdefault(name, []).extend(values)
    return found


def _values(name: str, option: Option, rest: list[str]) -> list[str]:
    """The values that follow a flag, taken off the rest."""
    if option.lone is not None:
        follows = bool(rest) and rest[0] in ("true", "false")
        return [rest.pop(0) if follows else option.lone]
    values = []
    for _ in range(option.values):
        if not rest or rest[0].startswith("--"):
            more = f"; a value that begins with dashes is written {name}=VALUE" if rest else ""
            needs = "a value" if option.values == 1 else f"{option.values} values"
            raise UserError(f"the flag needs {needs}", remedy=f"give {option.words}{more}", field=name)
        values.append(rest.pop(0))
    return values


def _check_positional(argument: str) -> None:
    if argument[:1] in _DASHES and argument:
        raise UserError(
            f"{shown(argument)} begins with a dash that is no hyphen",
            remedy="type the two hyphens of a flag again; copied text may have changed them",
        )
    if argument.startswith("-") and len(argument) > 1 and not _NUMBER.match(argument):
        raise UserError("no such flag", remedy=f"flags have two dashes: -{argument}", field=argument)
    if not argument.strip():
        raise UserError("an argument is empty", remedy="leave it out; a variable of the shell may not be set")


def _unknown(name: str, options: Mapping[str, Option]) -> UserError:
    near = difflib.get_close_matches(name, options, n=1)
    remedy = f"did you mean {near[0]}?" if near else "--help lists the flags"
    return UserError("no such flag", remedy=remedy, field=name)


def read_flag(flag: str, text: str, kind: Any) -> Any:
    """The text of a flag as a value of a type of :mod:`thence.settings.limits`. Raises UserError."""
    value = read_value(text, kind)
    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError:
        raise UserError(f"not what it takes: {shown(text)}", remedy=f"give {takes(kind)}", field=flag) from None


def only(positional: Sequence[str], what: str, usage: str) -> str:
    """The one thing that a command is about. Raises UserError where there are more or none."""
    if len(positional) == 1:
        return positional[0]
    named = [word.partition("=")[0] for word in positional if re.fullmatch(r"\w[\w-]*(\.[\w.-]+=?.*|=.*)", word)]
    likely = [name for name in named if not name.endswith((".toml", ".jsonl", ".gguf"))][:1]
    hint = f"did you mean --{likely[0]}? " if likely and len(positional) > 1 else ""
    given = f"not {len(positional)} ({', '.join(map(shown, positional))})" if positional else "and none was given"
    raise UserError(f"{what}, {given}", remedy=f"{hint}{usage}")


class Done(Exception):
    """The help was printed, and there is nothing else to do."""


class Parser(argparse.ArgumentParser):
    """argparse for the definitions and the help; the command line is taken apart by :func:`take_apart`.

    A mistake raises UserError. `type` may be a type of :mod:`thence.settings.limits`, wrapped by :func:`of`.
    """

    may_be_empty: frozenset[str] = frozenset()
    """Flags that take an empty text."""

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The arguments, read. Raises UserError; Done after the help."""
        options: dict[str, Option] = {}
        for action in self._actions:
            count = 1 if action.nargs is None else action.nargs
            values = count if isinstance(count, int) else 1
            repeated = isinstance(action, argparse._AppendAction)
            for name in action.option_strings:
                words = f"{action.metavar if isinstance(action.metavar, str) else 'a value'} ({action.help})"
                options[name] = Option(values, None, repeated, name in self.may_be_empty, words)
        found = take_apart(argv, options)
        if found.help:
            self.print_help()
            raise Done
        joined: list[str] = []
        for name, values in found.given.items():
            option = options[name]
            joined += [f"{name}={value}" for value in values] if option.values == 1 else [name, *values]
        return self.parse_args([*found.positional, *joined])

    def error(self, message: str) -> NoReturn:
        """What argparse itself finds, as an error of ours."""
        place = re.match(r"argument (\S+): ", message)
        problem = message[place.end() :] if place else message
        raise UserError(problem, remedy=f"`{self.prog} --help` lists what it takes", field=place[1] if place else None)


def of(kind: Any) -> Callable[[str], Any]:
    """A reader of text for argparse: values of a type of :mod:`thence.settings.limits`."""

    def read(text: str) -> Any:
        try:
            return TypeAdapter(kind).validate_python(read_value(text, kind), strict=True)
        except ValidationError:
            raise argparse.ArgumentTypeError(f"not what it takes: {shown(text)}; give {takes(kind)}") from None

    return read

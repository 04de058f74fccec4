"""A command line as the arguments of a typed function.

cyclopts binds them. A flag is given once, with a value that is not empty, as ``--flag VALUE`` or ``--flag=VALUE``; a
switch stands alone. What is wrong is said in thence's own words: the problem, the flag as it was typed, the remedy.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_origin

from cyclopts import App, Argument, CycloptsError, MissingArgumentError, RepeatArgumentError, Token
from pydantic import TypeAdapter

from thence.cli.app import HELP_FLAGS, WITH_FIELDS, make_app, print_help
from thence.errors import UserError
from thence.settings.annotations import takes
from thence.settings.limits import Place
from thence.settings.text_values import read_value
from thence.wording import shown

MAY_BE_EMPTY = ("--system",)
_NUMBER = re.compile(r"-(?:\d|\.\d|inf|nan)", re.IGNORECASE)
_DASHES = "‐‑‒–—―−﹣－"


def call(name: str, argv: Sequence[str]) -> int:
    """Take a command line apart, and call the command. Raises UserError."""
    return bind(name, argv)()


def bind(name: str, argv: Sequence[str]) -> Callable[[], int]:
    """The call that a command line asks for, with all its arguments read and nothing done yet. Raises UserError."""
    tokens, given = list(argv), {}
    if name == "audit":
        cut = tokens.index("--") if "--" in tokens else len(tokens)
        tokens, given["program"] = tokens[:cut], tokens[cut + 1 :]
    if any(token in HELP_FLAGS for token in tokens):
        return partial(print_help, name)
    importlib.import_module(f"thence.cli.{name}")  # so that a package that is missing is named
    app = make_app(_read)
    flags = flags_of(app[name])
    fields: Sequence[str] = ()
    if name in WITH_FIELDS:
        from thence.cli.fields import field_flags, take_fields

        fields = field_flags()
        tokens, given["overrides"] = take_fields(tokens, flags)
    tokens = _checked(tokens, flags, [*flags, *fields])
    try:
        function, bound, unused, _ = app.parse_known_args([name, *tokens])
    except CycloptsError as error:
        raise _explained(error, name) from None
    if unused:
        raise _too_many(name, flags, [*map(str, bound.args), *unused])
    return partial(function, *bound.args, **bound.kwargs, **given)


def flags_of(command: App) -> dict[str, Argument]:
    """The arguments of a command by name: flags with their dashes, others in capitals."""
    arguments = [argument for argument in command.assemble_argument_collection() if argument.parse]
    return {name: argument for argument in arguments for name in argument.names if name != "*"}


def _checked(argv: Sequence[str], flags: Mapping[str, Argument], suggested: Iterable[str]) -> list[str]:
    """Refuse flags that are not there and empty arguments. A value that begins with one dash is joined to its flag."""

    def is_value() -> bool:
        return bool(tokens) and tokens[-1] in flags and flags[tokens[-1]].hint is not bool

    tokens: list[str] = []
    for token in argv:
        flag, equals, _ = token.partition("=")
        if token.startswith("--"):
            if flag not in flags:
                near = difflib.get_close_matches(flag, suggested, n=1)
                remedy = f"did you mean {near[0]}?" if near else "--help lists the flags"
                raise UserError(f"no such flag: {flag}", remedy=remedy)
            if equals and flags[flag].hint is bool:
                raise UserError("the flag stands alone", remedy="leave out the = and what follows it", field=flag)
        elif token.startswith("-") and len(token) > 1 and not _NUMBER.match(token):
            if not is_value():
                raise UserError(f"no such flag: {token}", remedy=f"flags have two dashes: -{token}")
            token = f"{tokens.pop()}={token}"
        elif not is_value():
            _check_positional(token)
        tokens.append(token)
    return tokens


def _read(kind: Any, tokens: Sequence[Token]) -> Any:
    """The text of an argument as a value of its type; cyclopts then holds it against the bounds.

    Raises:
        UserError: an empty value.
        ValueError: not of this type; :func:`_explained` says what it takes.
    """
    for token in tokens:
        if token.keyword and not token.value.strip() and token.keyword not in MAY_BE_EMPTY:
            raise UserError("the value is empty", remedy="give one, or leave the flag out", field=token.keyword)
    if get_origin(kind) in (list, tuple):
        return get_origin(kind)(token.value for token in tokens)
    if kind is Path:
        return Path(TypeAdapter(Place).validate_python(tokens[0].value))
    return TypeAdapter(kind).validate_python(read_value(tokens[0].value, kind), strict=True)


def _explained(error: CycloptsError, name: str) -> UserError:
    """What cyclopts found wrong with a command line, in thence's words."""
    if isinstance(error, RepeatArgumentError):
        return UserError("the flag is given twice", remedy="give it once", field=error.token.keyword)
    argument = error.argument
    if argument is None:
        return UserError(str(error.msg or error).strip(), remedy=f"`thence {name} --help` shows what it takes")
    kind = argument.field_info.annotation
    if not isinstance(error, MissingArgumentError):
        given = " ".join(token.value for token in argument.tokens)
        return UserError(f"not what it takes: {shown(given)}", remedy=f"give {takes(kind)}", field=argument.name)
    if argument.field_info.is_positional:
        return none_given(name, argument.name.lower())
    count = argument.token_count()[0]
    needs = "a value" if count == 1 else f"{count} values"
    what = (argument.parameter.metavar if get_origin(argument.hint) else None) or takes(kind)
    dashes = f"; a value that begins with dashes is written {argument.name}=VALUE"
    return UserError(f"the flag needs {needs}", remedy=f"give {what}{dashes}", field=argument.name)


def refuse_without_on(on: str | None, given: Mapping[str, object]) -> None:
    """Raise UserError where a flag of a cluster is given and no cluster is."""
    flag = next((flag for flag, value in given.items() if value is not None), None)
    if on is None and flag is not None:
        remedy = "give --on ray too, or leave it out: processes of this machine take what they need"
        raise UserError("it goes with --on", remedy=remedy, field=flag)


def none_given(name: str, what: str) -> UserError:
    """What to say where a command lacks what it is about."""
    return UserError(f"thence {name} takes one {what}, and none was given", remedy=f"`thence {name} --help` shows how")


def _too_many(name: str, flags: Iterable[str], given: Sequence[str]) -> UserError:
    takes_one = [f"one {flag.lower()}" for flag in flags if not flag.startswith("--")]
    named = [text.partition("=")[0] for text in given if re.fullmatch(r"\w[\w-]*(\.[\w.-]+=?.*|=.*)", text)]
    likely = [text for text in named if not text.endswith((".toml", ".jsonl", ".gguf"))][:1]
    hint = f"did you mean --{likely[0]}? " if likely else ""
    problem = f"thence {name} takes {(takes_one or ['none'])[0]}, not {len(given)} ({', '.join(map(shown, given))})"
    return UserError(problem, remedy=f"{hint}`thence {name} --help` shows how")


def _check_positional(text: str) -> None:
    if not text.strip():
        raise UserError("an argument is empty", remedy="leave it out; a variable of the shell may not be set")
    if text[0] in _DASHES:
        raise UserError(
            f"{shown(text)} begins with a dash that is no hyphen",
            remedy="type the two hyphens of a flag again; copied text may have changed them",
        )


def read_flag(flag: str, text: str, kind: Any) -> Any:
    """A text as a value of a type of :mod:`thence.settings.limits`, where a flag holds several. Raises UserError."""
    try:
        return TypeAdapter(kind).validate_python(read_value(text, kind), strict=True)
    except ValueError:
        raise UserError(f"not what it takes: {shown(text)}", remedy=f"give {takes(kind)}", field=flag) from None

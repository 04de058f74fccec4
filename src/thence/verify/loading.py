"""Finding a reward function or an environment of the user's own: in a file or in a module."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from thence.errors import UserError
from thence.foreign_text import one_line

RewardFunction = Callable[..., Any]
"""`def reward(prompt, response, answer)`: a finite number, a dict of them, or None where it cannot tell."""

SIGNATURE = "def reward(prompt: str, response: str, answer: str | None) -> float | None"
ENVIRONMENT_SIGNATURE = (
    "class NAME with reset(self, row: dict) -> str | None and step(self, text: str) -> (observation, reward, done)"
)
BUILT_IN = ("exact", "math", "math-after-think", "math-boxed")
RIGHT_FROM = "right_from"
"""Name of the attribute with which a function states the score from which a response is right."""
BATCHED, COLUMNS = "batched", "columns"
"""Names of the attribute with which a function says that it takes lists, and of the parameter for a row's columns."""
SEED = "seed"
"""Name of the parameter of an environment's `reset` that gets a number to seed random numbers with."""


@dataclass(frozen=True)
class Kind:
    """What of the user's own is loaded, for messages.

    Args:
        word: what it is called.
        field: of a stage's table that names it.
    """

    word: str
    field: str


REWARD = Kind("reward", "reward")
ENVIRONMENT = Kind("environment", "environment.path")


def load_function(spec: str) -> RewardFunction:
    """Load the own reward function at `package.module:function` or `path/to/file.py:function` into this process.

    Raises:
        UserError: what is wrong with it, and how to fix that.
    """
    place, name = split_spec(spec)
    function = getattr(_load(spec, REWARD), name, None)
    if not callable(function):
        problem = f"{place} has no {name!r}" if function is None else f"{name!r} in {place} is not a function"
        raise UserError(f"reward {spec}: {problem}", remedy=f"write there: {SIGNATURE}", field="reward")
    _check_signature(function, spec)
    return cast(RewardFunction, function)


def load_environment(spec: str) -> type[Any]:
    """Load the environment's class at `package.module:Class` or `path/to/file.py:Class` into this process.

    Raises:
        UserError: what is wrong with it, and how to fix that.
    """
    place, name = split_spec(spec, ENVIRONMENT)
    found = getattr(_load(spec, ENVIRONMENT), name, None)
    if not isinstance(found, type):
        problem = f"{place} has no {name!r}" if found is None else f"{name!r} in {place} is not a class"
        raise _unlike(spec, problem)
    for method, given in (("reset", ("row",)), ("step", ("text",))):
        own = getattr(found, method, None)
        if not callable(own):
            raise _unlike(spec, f"its class has no {method}")
        if inspect.iscoroutinefunction(own) or inspect.isgeneratorfunction(own):
            raise _unlike(spec, f"its {method} is async or a generator: calling it gives no result")
        try:
            signature = inspect.signature(own)
            seed = {SEED: 0} if method == "reset" and SEED in signature.parameters else {}
            signature.bind("self", *given, **seed)
        except TypeError as error:
            raise _unlike(spec, f"its {method} cannot be called with {given[0]}: {error}") from error
        except ValueError:  # methods written in C may have none to look at
            pass
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise _unlike(spec, f"its class cannot be called without arguments: {error}") from error
    except ValueError:
        pass
    return found


def _unlike(spec: str, problem: str) -> UserError:
    return UserError(
        f"environment {spec}: {problem}", remedy=f"write there: {ENVIRONMENT_SIGNATURE}", field=ENVIRONMENT.field
    )


def wants_seed(environment: type[Any]) -> bool:
    """Whether the environment's `reset` has a parameter for a seed."""
    try:
        return SEED in inspect.signature(environment.reset).parameters
    except (TypeError, ValueError):
        return False


def split_spec(spec: str, kind: Kind = REWARD) -> tuple[str, str]:
    """The file or module of a function or class, and its name there. Raises UserError where the spec names neither."""
    place, colon, name = spec.rpartition(":")
    own = "function" if kind is REWARD else "Class"
    if not colon or not place or not name:
        built_in = f"{', '.join(BUILT_IN)}, " if kind is REWARD else ""
        raise UserError(
            f"no {kind.word} is called {spec!r}",
            remedy=f"use {built_in}package.module:{own} or path/to/file.py:{own}",
            field=kind.field,
        )
    if place == "__main__":
        raise UserError(
            f"{kind.word} {spec}: a {own.lower()} of the script that runs cannot be loaded by another process",
            remedy=f"move it into a separate file and give path/to/file.py:{own}",
            field=kind.field,
        )
    return place, name


def stated_threshold(function: Callable[..., Any], spec: str, kind: Kind = REWARD) -> tuple[bool, float | None]:
    """Whether the function has an attribute `right_from`, and its value: a finite number, or None for "never right".

    Raises:
        UserError: it is something else.
    """
    missing = object()
    value = getattr(function, RIGHT_FROM, missing)
    if value is missing:
        return False, None
    if value is None:
        return True, None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(
            f"{RIGHT_FROM} of {kind.word} {spec} is {one_line(repr(value), 60)}",
            remedy="set it to the score from which a response is right, for example 1.0, or to None: never",
            field=kind.field,
        )
    return True, float(value)


def wants_columns(function: Callable[..., Any]) -> bool:
    """Whether the function has a parameter for the row's other columns."""
    try:
        return COLUMNS in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def function_file(spec: str) -> Path | None:
    """The file of the user's function; None if it is not known. None of its code is run to find out."""
    place = spec.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place)
    found = _find_module(place) if place else None
    return Path(found.origin) if found is not None and found.origin and Path(found.origin).is_file() else None


def error_place(error: BaseException, file: str | None) -> tuple[str | None, int | None]:
    """File and line at which an error arose: the innermost line in `file`, or else the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if file is not None and frame.filename == file]
    for frame in reversed(own or frames):
        return frame.filename, frame.lineno
    return None, None


def said(error: BaseException) -> str:
    """What an error says: its type and its message on one line. A `sys.exit` is named as what it is."""
    if isinstance(error, SystemExit):
        return f"called sys.exit({'' if error.code is None else one_line(repr(error.code), 200)})"
    try:
        message = one_line(str(error), 1000)
    except Exception as second:  # an error whose text fails too
        message = f"(its message cannot be read: {type(second).__name__})"
    return f"raised {type(error).__name__}" + (f": {message}" if message else "")


def _find_module(name: str) -> ModuleSpec | None:
    """A module's specification. Unlike `importlib.util.find_spec` this never imports the packages above it."""
    top, *below = name.split(".")
    try:
        found = importlib.util.find_spec(top)
        for depth in range(len(below)):
            if found is None:
                return None
            inner = ".".join([top, *below[: depth + 1]])
            found = PathFinder.find_spec(inner, list(found.submodule_search_locations or ()))
    except (ImportError, ValueError, AttributeError):
        return None
    return found


def _load(spec: str, kind: Kind) -> ModuleType:
    place = split_spec(spec, kind)[0]
    return _load_file(Path(place), spec, kind) if place.endswith(".py") else _load_module(place, spec, kind)


def _load_file(file: Path, spec: str, kind: Kind) -> ModuleType:
    if not file.is_file():
        remedy = f"give the path from {Path.cwd()} or from the root"
        raise UserError(f"{kind.word} {spec}: there is no file {file}", remedy=remedy, field=kind.field)
    name = f"thence_{kind.word}_{file.stem}"
    found = importlib.util.spec_from_file_location(name, file)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickling look their module up by name
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _import_error(spec, kind, error, f"fix {file}: it has to run by itself", found.origin) from error
    return module


def _load_module(name: str, spec: str, kind: Kind) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        file = Path(*name.split(".")).with_suffix(".py")
        remedy = f"write {file}:{spec.rpartition(':')[2]}" if file.is_file() else f"install or fix the module {name}"
        found = _find_module(name)
        raise _import_error(spec, kind, error, remedy, found.origin if found is not None else None) from error


def _import_error(spec: str, kind: Kind, error: BaseException, remedy: str, origin: str | None) -> UserError:
    file, line = error_place(error, origin)
    if isinstance(error, SyntaxError):  # raised before any of the file's own lines runs
        file, line = error.filename or origin, error.lineno
    elif file != origin:  # the machinery of import itself
        file, line = None, None
    why = error.msg if isinstance(error, SyntaxError) else said(error).removeprefix("raised ")
    problem = f"{kind.word} {spec} cannot be imported: {f'it {why}' if isinstance(error, SystemExit) else why}"
    return UserError(problem, remedy=remedy, file=file, line=line, field=kind.field)


def _check_signature(function: Callable[..., Any], spec: str) -> None:
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        kind = "async def" if inspect.iscoroutinefunction(function) else "a generator (it has a yield)"
        problem = f"reward {spec} is {kind}: calling it gives no number"
        raise UserError(problem, remedy=f"give it the signature: {SIGNATURE}", field="reward")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # functions written in C may have none to look at
        return
    try:
        signature.bind("prompt", "response", "answer", **({COLUMNS: {}} if COLUMNS in signature.parameters else {}))
    except TypeError as error:
        problem = f"reward {spec} cannot be called with a prompt, a response and an answer: {error}"
        raise UserError(problem, remedy=f"give it the signature: {SIGNATURE}", field="reward") from error

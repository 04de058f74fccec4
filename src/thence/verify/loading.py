"""Finding a reward function of the user's own: in a file or in a module."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from thence.errors import UserError
from thence.foreign_text import one_line

RewardFunction = Callable[..., Any]
"""`def reward(prompt, response, answer)`: a finite number, a dict of them, or None where it cannot tell."""

SIGNATURE = "def reward(prompt: str, response: str, answer: str | None) -> float | None"
BUILT_IN = ("exact", "math", "math-after-think", "math-boxed")
RIGHT_FROM = "right_from"
"""Name of the attribute with which a function states the score from which a response is right."""
BATCHED, COLUMNS = "batched", "columns"
"""Names of the attribute with which a function says that it takes lists, and of the parameter for a row's columns."""


def load_function(spec: str) -> RewardFunction:
    """Load the own reward function at `package.module:function` or `path/to/file.py:function` into this process.

    Raises:
        UserError: what is wrong with it, and how to fix that.
    """
    place, name = split_spec(spec)
    module = _load_file(Path(place), spec) if place.endswith(".py") else _load_module(place, spec)
    function = getattr(module, name, None)
    if not callable(function):
        problem = f"{place} has no {name!r}" if function is None else f"{name!r} in {place} is not a function"
        raise UserError(f"reward {spec}: {problem}", remedy=f"write there: {SIGNATURE}", field="reward")
    _check_signature(function, spec)
    return cast(RewardFunction, function)


def split_spec(spec: str) -> tuple[str, str]:
    """The file or module of the user's function, and its name. Raises UserError where the spec names neither."""
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise UserError(
            f"no reward is called {spec!r}",
            remedy=f"use {', '.join(BUILT_IN)}, package.module:function or path/to/file.py:function",
            field="reward",
        )
    if place == "__main__":
        raise UserError(
            f"reward {spec}: a function of the script that runs cannot be loaded by another process",
            remedy="move it into a separate file and give path/to/file.py:function",
            field="reward",
        )
    return place, name


def stated_threshold(function: Callable[..., Any], spec: str) -> tuple[bool, float | None]:
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
            f"{RIGHT_FROM} of reward {spec} is {one_line(repr(value), 60)}",
            remedy="set it to the score from which a response is right, for example 1.0, or to None: never",
            field="reward",
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


def _load_file(file: Path, spec: str) -> ModuleType:
    if not file.is_file():
        remedy = f"give the path from {Path.cwd()} or from the root"
        raise UserError(f"reward {spec}: there is no file {file}", remedy=remedy, field="reward")
    name = f"thence_reward_{file.stem}"
    found = importlib.util.spec_from_file_location(name, file)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickling look their module up by name
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _import_error(spec, error, f"fix {file}: it has to run by itself", found.origin) from error
    return module


def _load_module(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        file = Path(*name.split(".")).with_suffix(".py")
        remedy = f"write {file}:{spec.rpartition(':')[2]}" if file.is_file() else f"install or fix the module {name}"
        found = _find_module(name)
        raise _import_error(spec, error, remedy, found.origin if found is not None else None) from error


def _import_error(spec: str, error: BaseException, remedy: str, origin: str | None) -> UserError:
    file, line = error_place(error, origin)
    if isinstance(error, SyntaxError):  # raised before any of the file's own lines runs
        file, line = error.filename or origin, error.lineno
    elif file != origin:  # the machinery of import itself
        file, line = None, None
    why = error.msg if isinstance(error, SyntaxError) else said(error).removeprefix("raised ")
    problem = f"reward {spec} cannot be imported: {f'it {why}' if isinstance(error, SystemExit) else why}"
    return UserError(problem, remedy=remedy, file=file, line=line, field="reward")


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

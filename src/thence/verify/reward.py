"""Graders by name: answer checkers of this package and reward functions of the user, behind one interface."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from thence.errors import UserError
from thence.verify.exact import grade_exact
from thence.verify.math import Rule
from thence.verify.pool import GradeRequest, GradingPool
from thence.verify.verdict import Grade, Verdict, unknown

RewardFunction = Callable[[str, str, str | None], float | None]
"""`def reward(prompt, response, answer)`: a finite number, or None where it cannot tell."""

SIGNATURE = "def reward(prompt: str, response: str, answer: str | None) -> float | None"
MATH_RULES: dict[str, Rule] = {"math": "plain", "math-after-think": "after_think", "math-boxed": "boxed"}
"""Reward versions 4, 3 and 6 of the LUFFY and HPT code, in this order: see `thence.verify.math.graded_part`."""


class Grader(ABC):
    """Grades responses. A context manager; `close` ends whatever processes it holds."""

    @abstractmethod
    def grade_many(
        self, prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str | None]
    ) -> list[Grade]:
        """One grade for each response, in order. The three sequences are of one length (else ValueError)."""

    def close(self) -> None:
        """Give up processes. May be called twice."""
        return

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ExactGrader(Grader):
    """Exact match after the last marker: see `grade_exact`."""

    def grade_many(
        self, prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str | None]
    ) -> list[Grade]:
        rows = zip(prompts, responses, answers, strict=True)
        return [grade_exact(response, answer) for _, response, answer in rows]


class MathGrader(Grader):
    """Mathematical equality in a guarded pool: see `grade_math` and `GradingPool`."""

    def __init__(self, rule: Rule, pool: GradingPool):
        self._rule: Rule = rule
        self._pool = pool

    def grade_many(
        self, prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str | None]
    ) -> list[Grade]:
        rows = zip(prompts, responses, answers, strict=True)
        return self._pool.grade_many([GradeRequest(response, answer, self._rule) for _, response, answer in rows])

    def close(self) -> None:
        self._pool.close()


class FunctionGrader(Grader):
    """An own reward function, called in this process. Its number is the score; a verdict is RIGHT above zero."""

    def __init__(self, function: RewardFunction, name: str):
        self._function, self._name = function, name

    def grade_many(
        self, prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str | None]
    ) -> list[Grade]:
        rows = enumerate(zip(prompts, responses, answers, strict=True), start=1)
        return [self._grade(row, *fields) for row, fields in rows]

    def _grade(self, row: int, prompt: str, response: str, answer: str | None) -> Grade:
        where = f"response {row} of the batch (prompt {_short(repr(prompt))})"
        try:
            value = self._function(prompt, response, answer)
        except Exception as error:
            raise UserError(
                f"reward function {self._name} raised {type(error).__name__} on {where}: {error}",
                remedy="fix it, or let it return None where it cannot tell",
            ) from error
        if value is None:
            return unknown("the reward function returned None")
        score = _number(value)
        if score is None:
            raise UserError(
                f"reward function {self._name} returned {_short(repr(value))} on {where}",
                remedy="let it return a finite number, or None where it cannot tell",
            )
        return Grade(Verdict.RIGHT if score > 0 else Verdict.WRONG, score)


def load_reward(spec: str, *, seconds: float = 10.0, workers: int | None = None, memory_mb: int = 1024) -> Grader:
    """The grader that a recipe's `reward` names.

    Args:
        spec: `exact`, `math`, `math-after-think`, `math-boxed`, or an own function: `package.module:function` or
            `path/to/file.py:function`, with the signature `reward(prompt, response, answer) -> float | None`.
        seconds, workers, memory_mb: limits of `GradingPool`; own functions run in this process, without limits.

    Raises:
        UserError: an unknown name, or a function that cannot be loaded or called with three values.
    """
    if spec == "exact":
        return ExactGrader()
    if spec in MATH_RULES:
        return MathGrader(MATH_RULES[spec], GradingPool(workers, seconds, memory_mb))
    return FunctionGrader(load_function(spec), spec)


def load_function(spec: str) -> RewardFunction:
    """The own reward function at `package.module:function` or `path/to/file.py:function`.

    Raises:
        UserError: what is wrong with it, and how to fix that.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise UserError(
            f"no reward is called {spec!r}",
            remedy=f"use exact, {', '.join(MATH_RULES)}, package.module:function or path/to/file.py:function",
            field="reward",
        )
    module = _load_file(Path(place), spec) if place.endswith(".py") else _load_module(place, spec)
    function = getattr(module, name, None)
    if not callable(function):
        problem = f"{place} has no {name!r}" if function is None else f"{name!r} in {place} is not a function"
        raise UserError(f"reward {spec}: {problem}", remedy=f"write there: {SIGNATURE}", field="reward")
    _check_signature(function, spec)
    return cast(RewardFunction, function)


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
    except Exception as error:
        raise _import_error(spec, error, f"fix {file}: it has to run by itself") from error
    return module


def _load_module(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        file = Path(*name.split(".")).with_suffix(".py")
        remedy = f"write {file}:{spec.rpartition(':')[2]}" if file.is_file() else f"install or fix the module {name}"
        raise _import_error(spec, error, remedy) from error


def _import_error(spec: str, error: Exception, remedy: str) -> UserError:
    problem = f"reward {spec} cannot be imported: {type(error).__name__}: {error}"
    return UserError(problem, remedy=remedy, field="reward")


def _check_signature(function: Callable[..., Any], spec: str) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # functions written in C may have none to look at
        return
    try:
        signature.bind("prompt", "response", "answer")
    except TypeError as error:
        problem = f"reward {spec} cannot be called with a prompt, a response and an answer: {error}"
        raise UserError(problem, remedy=f"give it the signature: {SIGNATURE}", field="reward") from error


def _number(value: Any) -> float | None:
    """A finite number as a float (also a NumPy or torch scalar), else None."""
    if isinstance(value, (str, bytes)):
        return None
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return score if math.isfinite(score) else None


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."

"""Graders by name: answer checkers of this package and reward functions of the user, behind one interface."""

from __future__ import annotations

from collections.abc import Sequence

from thence.errors import UserError
from thence.verify.exact import grade_exact
from thence.verify.grader import Grader
from thence.verify.loading import BUILT_IN
from thence.verify.math import Rule
from thence.verify.own_function import SLOW_IN_A_ROW, FunctionGrader
from thence.verify.pool import GradeRequest, GradingPool
from thence.verify.verdict import Grade

__all__ = ["MATH_RULES", "ExactGrader", "FunctionGrader", "Grader", "MathGrader", "is_own", "load_reward"]

MATH_RULES: dict[str, Rule] = {"math": "plain", "math-after-think": "after_think", "math-boxed": "boxed"}
"""Reward versions 4, 3 and 6 of the LUFFY and HPT code, in this order: see `thence.verify.math.graded_part`."""


class ExactGrader(Grader):
    """Exact match after the last marker: see `grade_exact`."""

    def grade_many(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        answers: Sequence[str | None],
        columns: Sequence[str] | None = None,
    ) -> list[Grade]:
        rows = zip(prompts, responses, answers, strict=True)
        return [grade_exact(response, answer) for _, response, answer in rows]


class MathGrader(Grader):
    """Mathematical equality in a guarded pool: see `grade_math` and `GradingPool`."""

    def __init__(self, rule: Rule, pool: GradingPool):
        self._rule: Rule = rule
        self._pool = pool

    def grade_many(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        answers: Sequence[str | None],
        columns: Sequence[str] | None = None,
    ) -> list[Grade]:
        rows = zip(prompts, responses, answers, strict=True)
        return self._pool.grade_many([GradeRequest(response, answer, self._rule) for _, response, answer in rows])

    def close(self) -> None:
        self._pool.close()


def is_own(spec: str) -> bool:
    """Whether a reward is a function of the user's own, and not one of this package."""
    return spec not in BUILT_IN


def load_reward(
    spec: str,
    *,
    seconds: float = 10.0,
    workers: int | None = None,
    memory_mb: int = 1024,
    right_from: float | None = None,
    slow_in_a_row: int = SLOW_IN_A_ROW,
    setting: str = "reward_seconds",
) -> Grader:
    """The grader that a recipe's `reward` names.

    Args:
        spec: `exact`, `math`, `math-after-think`, `math-boxed`, or the user's function: `package.module:function` or
            `path/to/file.py:function`, with the signature `reward(prompt, response, answer) -> float | dict | None`.
        seconds: wall-clock limit of one response.
        workers, memory_mb: limits of `GradingPool`; the user's function has one process and no memory limit.
        right_from: the lowest score of the user's function that is right; default: what the function states.
        slow_in_a_row: this many time-outs of the user's function in a row are an error.
        setting: what the time limit is called where it is set, for messages.

    Raises:
        UserError: an unknown name, a function that cannot be loaded or called with three values, or `right_from` for
            a grader that knows by itself what is right.
    """
    if is_own(spec):
        return FunctionGrader(spec, seconds, right_from, slow_in_a_row, setting)
    if right_from is not None:
        raise UserError(
            f"reward {spec} says by itself which responses are right",
            remedy="leave reward_right_from out; it is for a reward function of your own",
            field="reward_right_from",
        )
    if spec == "exact":
        return ExactGrader()
    return MathGrader(MATH_RULES[spec], GradingPool(workers, seconds, memory_mb))

"""Verdicts by short names, and one from a pool of graders."""

from __future__ import annotations

from thence.verify import GradeRequest, GradingPool, Verdict
from thence.verify.math import Rule

RIGHT, WRONG, UNKNOWN = Verdict.RIGHT, Verdict.WRONG, Verdict.UNKNOWN


def verdict(pool: GradingPool, response: str, answer: str | None, rule: Rule = "plain") -> Verdict:
    return pool.grade_many([GradeRequest(response, answer, rule)])[0].verdict

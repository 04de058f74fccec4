"""Answer checking: right, wrong, graded or unknown. Nothing here imports torch, and only workers import math-verify."""

from thence.verify.exact import grade_exact
from thence.verify.grader import Grader
from thence.verify.loading import RewardFunction, load_function
from thence.verify.pool import GradeRequest, GradingPool
from thence.verify.reward import load_reward
from thence.verify.verdict import Grade, Verdict, count

__all__ = [
    "Grade",
    "GradeRequest",
    "Grader",
    "GradingPool",
    "RewardFunction",
    "Verdict",
    "count",
    "grade_exact",
    "load_function",
    "load_reward",
]

"""Answer checking with three verdicts. Nothing here imports torch, and math-verify only inside worker processes."""

from thence.verify.exact import grade_exact
from thence.verify.pool import GradeRequest, GradingPool
from thence.verify.reward import Grader, RewardFunction, load_function, load_reward
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

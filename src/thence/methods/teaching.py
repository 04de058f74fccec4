"""A model as its own teacher, for methods that have one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Teacher:
    """The same model as a teacher: it scores a response without gradient, under a prompt that holds a solution.

    Args:
        weights: ``current``: the policy's before every optimizer step; ``start``: those that the stage began with;
            ``average``: their moving average.
        form: the teacher's question, with {prompt} where the question stands and {solution} where the solution does.
        rate: share of the policy's weights in the moving average after every optimizer step.
    """

    weights: Literal["current", "start", "average"]
    form: str
    rate: float = 0.05

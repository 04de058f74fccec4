"""The grader of a stage."""

from __future__ import annotations

from typing import Any

from thence.recipe import Eval, Rl
from thence.verify.grader import Grader
from thence.verify.reward import load_reward


def stage_reward(stage: Rl | Eval, **limits: Any) -> Grader:
    """The grader that a stage's `reward` names, with the stage's settings. Raises UserError as `load_reward` does.

    Args:
        limits: other arguments of `load_reward`.
    """
    right_from = stage.reward_right_from
    return load_reward(stage.reward, seconds=stage.reward_seconds, right_from=right_from, **limits)

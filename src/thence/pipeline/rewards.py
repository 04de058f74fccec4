"""The grader of a stage."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from thence.data.template import ChatFormat
from thence.recipe import Eval, Rl
from thence.rollout.turns import Player
from thence.verify.grader import Grader
from thence.verify.own_function import SLOW_IN_A_ROW
from thence.verify.reward import load_reward
from thence.verify.weighted import WeightedGrader


def stage_reward(stage: Rl | Eval, chat: ChatFormat | None = None, **limits: Any) -> Grader:
    """The grader that a stage's `reward` or `rewards` name, with its settings; of an environment, who plays in it.

    Args:
        chat: of the stage's prompts, where rollouts of several turns are to be played.
        limits: other arguments of `load_reward`.

    Raises:
        UserError: as :func:`load_reward`, or the environment cannot be loaded.
    """
    right_from = stage.reward_right_from
    if stage.environment is not None:
        own = {"processes": limits.get("workers"), "slow_in_a_row": limits.get("slow_in_a_row", SLOW_IN_A_ROW)}
        return Player(stage.environment, right_from, chat, **own)
    if len(names := reward_names(stage)) > 1 or list(names.values()) != [1.0]:
        with ExitStack() as opened:
            graders = {
                short: (weight, opened.enter_context(_one(stage, spec, None if i else right_from, limits)))
                for i, (short, spec, weight) in enumerate(_shortened(names))
            }
            opened.pop_all()  # the grader of all of them closes them
        return WeightedGrader(graders)
    return _one(stage, next(iter(names)), right_from, limits)


def reward_names(stage: Rl | Eval) -> dict[str, float]:
    """The rewards of a stage and their weights; the environment, where one gives the rewards."""
    if stage.environment is not None:
        return {stage.environment.path: 1.0}
    return (isinstance(stage, Rl) and stage.rewards) or {stage.reward: 1.0}


def _shortened(names: dict[str, float]) -> list[tuple[str, str, float]]:
    """Each reward with the name that metrics have for it: that of the function, where no other is called so."""
    short = [spec.rpartition(":")[2] for spec in names]
    return [
        (own if short.count(own) == 1 else spec, spec, weight)
        for own, (spec, weight) in zip(short, names.items(), strict=True)
    ]


def _one(stage: Rl | Eval, spec: str, right_from: float | None, limits: dict[str, Any]) -> Grader:
    return load_reward(spec, seconds=stage.reward_seconds, right_from=right_from, **limits)

"""A stage's reward tried on one response before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thence.data.observation import observation_form
from thence.data.template import chat_format
from thence.data.trajectory import Prompt
from thence.pipeline.rewards import reward_names, stage_reward
from thence.recipe import Data, Eval, Rl
from thence.rollout.turns import check_prompts
from thence.verify.reward import is_own
from thence.verify.verdict import Verdict

DEGREES = (
    "a score of {:g} and no threshold, so results are a mean reward: for an accuracy state from which score a response "
    "is right: reward_right_from, or the function's attribute right_from"
)
_tried_rewards: dict[tuple[Any, ...], str] = {}  # of this process, which may make many runs


UNKNOWN_LENGTH = "the tokens of its observations are not known before it is played, and no plan counts them"


def try_environment(stage: Rl | Eval, prompts: Sequence[Prompt], tokenizer: Any, data: Data) -> str:
    """Load a stage's environment, and let it answer the demonstration of the first prompt, or its answer, as one turn.

    Returns:
        What there is to say of it.

    Raises:
        UserError: it cannot be loaded, or fails; or the chat template cannot write its observations.
    """
    said = try_reward(stage, prompts, tokenizer)
    if tokenizer is not None and prompts:
        chat = chat_format(tokenizer, data.template, data.template_variables)
        assert stage.environment is not None
        check_prompts(observation_form(tokenizer, chat, stage.environment.role), prompts)
    return f"{said}; {UNKNOWN_LENGTH}" if said else UNKNOWN_LENGTH


def try_reward(stage: Rl | Eval, prompts: Sequence[Prompt], tokenizer: Any) -> str:
    """Load a stage's reward, or all of them, and let it grade the demonstration of the first prompt, or its answer.

    Returns:
        What there is to say of it; empty: nothing.

    Raises:
        UserError: it cannot be loaded, or fails.
    """
    names = reward_names(stage)
    files = [Path(spec.rpartition(":")[0]) for spec in names]
    changed = tuple(file.stat().st_mtime if file.is_file() else 0.0 for file in files)
    key = (tuple(names.items()), changed, stage.reward_seconds, stage.reward_right_from, str(stage.environment))
    if key in _tried_rewards:
        return _tried_rewards[key]
    own = any(map(is_own, names))
    with stage_reward(stage, workers=1, slow_in_a_row=1) as grader:
        if own and not prompts:
            return "loaded, not called: there is no prompt to call it with"
        first = prompts[0] if prompts else Prompt(0, (), answer="1")
        decode = getattr(tokenizer, "decode", None)
        shown = first.demonstration_ids if own and decode is not None else None
        text = f"The answer is {first.answer}."
        if decode is not None and shown:
            text = decode(shown, skip_special_tokens=True)
        found = grader.grade_many([first.text], [text], [first.answer], [first.columns])[0]
    degrees = found.verdict is Verdict.GRADED
    _tried_rewards[key] = DEGREES.format(found.score) if degrees else ""
    return _tried_rewards[key]

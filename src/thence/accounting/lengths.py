"""How long prompts, responses and observations are: on average for FLOPs, at most for memory."""

from __future__ import annotations

import math

from thence.accounting.batches import Turns
from thence.accounting.known import Known
from thence.recipe import Data, Eval, Rl


def longest_prompt(data: Data, known: Known) -> int:
    """Tokens of the longest prompt, or of the mean one where nothing else is known."""
    return data.max_prompt_tokens or known.longest_prompt or math.ceil(known.prompt or 0)


def longest_row(stage: Rl | Eval, data: Data, known: Known) -> int:
    """Tokens of the longest prompt with the longest response, and with all that an environment may say."""
    prompt = longest_prompt(data, known)
    length = prompt + longest_response(stage, prompt, known)
    if stage.environment is None:
        return length
    longest = length + stage.environment.max_observation_tokens
    return longest if known.room is None else max(length, min(longest, known.room))


def longest_response(stage: Rl | Eval, prompt: int, known: Known) -> int:
    """``max_tokens``, or what the model's context leaves of it where the recipe does not set it."""
    if known.room is None or "max_tokens" in stage.model_fields_set:
        return stage.max_tokens
    return max(1, min(stage.max_tokens, known.room - prompt))


def mean_response(name: str, stage: Rl | Eval, known: Known) -> float:
    """Tokens that the policy samples in a rollout, on average."""
    if stage.expected_tokens is not None:
        length = capped(stage.expected_tokens, stage.max_tokens)
        known.assume(f"{name}: responses of {length:,.0f} tokens on average, by expected_tokens")
        return length
    longest = longest_response(stage, math.ceil(known.prompt or 0), known)
    if known.response is None:
        known.assume(f"{name}: every response is counted as long as max_tokens, {longest:,}: an upper bound")
        return float(longest)
    length = capped(known.response, longest)
    known.assume(f"{name}: responses of {length:,.0f} tokens on average, as the demonstrations")
    return length


def mean_turns(name: str, stage: Rl | Eval, known: Known) -> Turns:
    """Turns of a rollout and tokens of its observations, on average."""
    own = stage.environment
    if own is None:
        return Turns()
    turns, observed = own.expected_turns, own.expected_observation_tokens
    missing = [key for key, value in (("turns", turns), ("observation_tokens", observed)) if value is None]
    if missing:
        fields = " and ".join(f"{name}.environment.expected_{key}" for key in missing)
        known.assume(f"{name}: what several turns and their observations cost is not fully counted without {fields}")
    turns, observed = min(turns or 1.0, own.max_turns), min(observed or 0.0, own.max_observation_tokens)
    if turns > 1 or observed:
        known.assume(
            f"{name}: {turns:g} turns and {observed:,.0f} tokens of observations in a rollout, as expected; every turn "
            "reads its whole row again"
        )
    return Turns(turns, observed)


def capped(length: float, limit: int | None) -> float:
    """A mean length that no row exceeds a limit of."""
    return length if limit is None else min(length, float(limit))

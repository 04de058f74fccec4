"""Whether rows and responses fit into the model's context, and how long a response may be."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from thence.data.trajectory import Prompt
from thence.errors import DataError, RecipeError
from thence.recipe import Eval, Rl

log = logging.getLogger(__name__)


def response_tokens(
    name: str, stage: Rl | Eval, prompts: Sequence[Prompt], context: int | None, *, say: bool = True
) -> int:
    """The longest response of a stage: ``max_tokens``, or what fits where the recipe does not set it.

    Args:
        name: of the stage.
        context: most tokens of a row; None: no limit.
        say: log it where the recipe's length is cut.

    Raises:
        DataError: a prompt that is empty, or that leaves no room for a response.
        RecipeError: the recipe sets ``max_tokens``, and the longest prompt leaves less.
    """
    shortest = min(prompts, key=lambda prompt: len(prompt.token_ids))
    if not shortest.token_ids:
        raise DataError(
            f"the prompt of example {shortest.index + 1} has no token, so nothing can be sampled",
            remedy="give prompts (messages, or prompt + completion), or a template that begins the row",
            field=f"{name}.data",
        )
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    size = len(longest.token_ids)
    if context is None or size + stage.max_tokens <= context:
        return stage.max_tokens
    room, explicit = context - size, "max_tokens" in stage.model_fields_set
    says = f"the prompt of example {longest.index + 1} has {size:,} tokens"
    if room < 1:
        prompt_room = context - min(stage.max_tokens, context // 2)
        flags = f"--{name}.data.max-prompt-tokens {prompt_room}"
        if explicit and stage.max_tokens > context - prompt_room:
            flags += f" --{name}.max-tokens {context - prompt_room}"
        raise DataError(
            f"{says}, and the model's context of {context:,} leaves no room for a response",
            remedy=f"leave such examples out: {flags}",
            field=f"{name}.data",
        )
    if explicit:
        shorter = context - stage.max_tokens
        fits = shorter >= len(shortest.token_ids)
        rest = f", or --{name}.data.max-prompt-tokens {shorter} to leave longer prompts out" if fits else ""
        raise RecipeError(
            f"{says}; with {stage.max_tokens:,} more they exceed the model's context of {context:,}",
            remedy=f"--{name}.max-tokens {room}{rest}",
            field=f"{name}.max_tokens",
        )
    log.log(
        logging.WARNING if say else logging.DEBUG,
        "%s: max_tokens is not set and is cut from %d to %d: %s, the model's context %d",
        *(name, stage.max_tokens, room, says, context),
    )
    return room


def check_rows(name: str, prompts: Sequence[Prompt], context: int | None) -> None:
    """Refuse demonstrations that do not fit into the context behind their prompts. Raises DataError."""
    rows = [prompt for prompt in prompts if prompt.demonstration_ids]
    if context is None or not rows:
        return
    longest = max(rows, key=_row_tokens)
    if _row_tokens(longest) <= context:
        return
    too_long = sum(_row_tokens(row) > context for row in rows)
    prompt_tokens = max(len(row.token_ids) for row in rows)
    if prompt_tokens < context:
        flags = f"--{name}.data.max-response-tokens {context - prompt_tokens}"
    else:
        half = context // 2
        flags = f"--{name}.data.max-prompt-tokens {context - half} --{name}.data.max-response-tokens {half}"
    raise DataError(
        f"{too_long:,} of {len(rows):,} rows are longer than the model's context of {context:,} tokens, the longest is "
        f"example {longest.index + 1} with {_row_tokens(longest):,}",
        remedy=f"cut them: {flags} (a cut demonstration teaches no end token)",
        field=f"{name}.data",
    )


def _row_tokens(prompt: Prompt) -> int:
    return len(prompt.token_ids) + len(prompt.demonstration_ids or ())

"""Requests for responses, as vLLM's process reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from thence.errors import UserError
from thence.rollout.native import Sampling


def check_room(prompts: Sequence[Sequence[int]], max_model_len: int) -> None:
    """Raises ValueError for a prompt without a token, UserError for one that leaves no room for a response."""
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt has no token; give it at least a beginning token")
    longest = max(map(len, prompts))
    if longest >= max_model_len:
        raise UserError(
            f"a prompt has {longest} tokens, and vLLM was started for {max_model_len} with the response",
            remedy="raise vllm.max_model_len, or leave such prompts out with data.max_prompt_tokens",
            field="vllm.max_model_len",
        )


def generate_request(
    number: int,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    limits: Sequence[int],
    sampling: Sampling,
    logps: bool,
) -> dict[str, Any]:
    """The message that asks for one response per prompt; every different prompt is sent once.

    Args:
        number: of the request.
        limits: most tokens of each response, instead of `sampling.max_tokens`.
    """
    place: dict[tuple[int, ...], int] = {}
    rows = [
        [place.setdefault(tuple(prompt), len(place)), seed, limit]
        for prompt, seed, limit in zip(prompts, seeds, limits, strict=True)
    ]
    return {
        "op": "generate",
        "id": number,
        "prompts": [list(prompt) for prompt in place],
        "rows": rows,
        "sampling": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "stop_ids": list(sampling.stop_ids),
            "logps": logps,
        },
    }

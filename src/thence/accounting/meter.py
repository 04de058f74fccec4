"""Counting the FLOPs that a stage really executes, prompts, attention, output head and scoring passes included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from thence.accounting.flops import FAMILIES, causal_pairs, forward_flops, parameters, training_flops


class FlopMeter:
    """Adds up FLOPs of one process. Padding is not counted: it depends on the settings, not on the method.

    Args:
        config: the model's configuration as plain values. Where its family cannot be counted, ``total`` is None.
        checkpointing: activations are computed twice; a number k: those of every k-th layer.
        adapters: numbers in LoRA adapters that are trained instead of the weights; 0: the weights are trained. In
            scoring passes the adapters' own products are left out: about ``rank x (1 / inputs + 1 / outputs)`` of all.
    """

    def __init__(self, config: Mapping[str, Any], checkpointing: bool | int = False, adapters: int = 0):
        self._counts = parameters(config) if config.get("model_type") in FAMILIES else None
        self._checkpointing, self._adapters = checkpointing, adapters
        self._total = 0.0

    @property
    def total(self) -> float | None:
        """FLOPs so far."""
        return self._total if self._counts is not None else None

    def add(self, flops: float | None) -> None:
        """FLOPs that another meter of this model has counted; None: it could not, no more than this one can."""
        self._total += flops or 0.0

    def trained(self, lengths: Sequence[int], trained_tokens: int) -> None:
        """Rows that went forward and backward, with so many trained tokens in all."""
        if self._counts is not None:
            pairs = sum(map(causal_pairs, lengths))
            how = (self._checkpointing, self._adapters)
            self._total += training_flops(self._counts, sum(lengths), pairs, trained_tokens, *how)

    def scored(self, lengths: Sequence[int], scored_tokens: int) -> None:
        """Rows that went forward only, with so many log-probabilities taken."""
        if self._counts is not None:
            self._total += forward_flops(self._counts, sum(lengths), sum(map(causal_pairs, lengths)), scored_tokens)

    def sampled(self, prompts: Sequence[Sequence[int]], responses: Sequence[int]) -> None:
        """Responses of so many tokens each, sampled with a cache; a prompt that stands several times is read once.

        Args:
            prompts: token ids, one entry a response.
            responses: sampled tokens of each.
        """
        if self._counts is None:
            return
        for length in (len(prompt) for prompt in {tuple(prompt) for prompt in prompts}):
            self._total += forward_flops(self._counts, length, causal_pairs(length), 1)
        for prompt, tokens in zip(prompts, responses, strict=True):
            fed = max(tokens - 1, 0)  # the last sampled token is never fed back
            self._total += forward_flops(self._counts, fed, causal_pairs(fed, len(prompt)), fed)

"""What the sampler asks of a model: read prompts into a cache, then give the logits of one more token a row."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from thence.rollout.prompts import padded_left


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Numbers of the model's own type while it lasts."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


class Decoder(Protocol):
    """A model with a key-value cache over a changing set of rows."""

    def prefill(self, prompts: list[list[int]], repeat_U: Tensor, max_tokens: int) -> Tensor:
        """Read U different prompts, then hold ``repeat_U[u]`` rows of each, one after the other.

        Returns:
            The logits that predict the first response token of every row, shape (rows, V), float32.
        """
        ...

    def step(self, token_B: Tensor) -> Tensor:
        """Append one token to every row; the logits that predict the next, shape (B, V), float32."""
        ...

    def keep(self, row_K: Tensor) -> None:
        """Drop all rows but these, in this order."""
        ...


class TransformersDecoder:
    """Any Hugging Face causal language model, through transformers' cache."""

    def __init__(self, model: Any):
        from transformers import DynamicCache

        self.model, self.device = model, next(model.parameters()).device
        self.cache = DynamicCache(config=model.config)
        self.seen_BL = torch.zeros(0, 0, dtype=torch.int64, device=self.device)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.takes = set(inspect.signature(inner.forward).parameters)

    def prefill(self, prompts: list[list[int]], repeat_U: Tensor, max_tokens: int) -> Tensor:
        token_ids_UP, padding_U = padded_left(prompts, self.device)
        columns_P = torch.arange(token_ids_UP.shape[1], device=self.device)
        seen_UP = (columns_P >= padding_U[:, None]).long()
        logits_UV = self._forward(token_ids_UP, seen_UP)
        row_B = torch.arange(len(prompts), device=self.device).repeat_interleave(repeat_U.to(self.device))
        self.seen_BL = seen_UP
        self.keep(row_B)
        return logits_UV[row_B]

    def step(self, token_B: Tensor) -> Tensor:
        self.seen_BL = torch.cat([self.seen_BL, torch.ones_like(token_B)[:, None]], 1)
        return self._forward(token_B[:, None], self.seen_BL)

    def keep(self, row_K: Tensor) -> None:
        self.seen_BL = self.seen_BL[row_K]
        self.cache.reorder_cache(row_K)  # pyright: ignore[reportArgumentType] - states of recurrent layers too

    def _forward(self, token_ids_BN: Tensor, seen_BL: Tensor) -> Tensor:
        n = token_ids_BN.shape[1]
        inputs: dict[str, Any] = {"input_ids": token_ids_BN, "use_cache": True}
        if "past_key_values" in self.takes:
            inputs |= {"past_key_values": self.cache, "attention_mask": seen_BL}
        else:  # state-space models: what padding is matters while prompts are read, and the state holds the rest
            inputs |= {"cache_params": self.cache, "attention_mask": seen_BL if n == seen_BL.shape[1] else None}
        if "position_ids" in self.takes:
            inputs["position_ids"] = (seen_BL.cumsum(1) - 1).clamp(min=0)[:, -n:]
        if "logits_to_keep" in self.takes:
            inputs["logits_to_keep"] = 1
        return self.model(**inputs).logits[:, -1].float()

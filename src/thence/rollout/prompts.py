"""How prompts of different lengths are read at once: padded on the left, or end to end without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from thence.kernels.attention import packed_causal_attention


class Layout(Protocol):
    """U prompts as (rows, tokens) that a model reads; the cache has them padded on the left to P columns."""

    @property
    def token_ids(self) -> Tensor:
        """(rows, tokens), int64."""
        ...

    @property
    def position(self) -> Tensor:
        """Of each token in its prompt, (rows, tokens), int64."""
        ...

    @property
    def last_U(self) -> Tensor:
        """Where the last token of each prompt is among all, (U,), int64."""
        ...

    @property
    def padding_U(self) -> Tensor:
        """Columns of the cache before each prompt begins, (U,), int64."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of every prompt to itself.

        Args:
            q: (rows, heads, tokens, head size).
            k, v: (rows, kv heads, tokens, head size).

        Returns:
            (rows * tokens, heads * head size).
        """
        ...

    def columns(self, x: Tensor) -> Tensor:
        """Keys or values (rows, kv heads, tokens, head size) as the cache has them: (U, kv heads, P, head size)."""
        ...


def padded_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts padded on the left to the longest: token ids (U, P) and the padding of each (U,)."""
    longest = max(map(len, prompts))
    token_ids_UP = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    return token_ids_UP, torch.tensor([longest - len(p) for p in prompts], device=device)


@dataclass(frozen=True)
class Padded:
    """One row a prompt. Runs on every device."""

    token_ids: Tensor
    position: Tensor
    last_U: Tensor
    padding_U: Tensor
    mask: Tensor | None
    """Which columns a token sees, (U, 1, P, P), bool; None where no prompt is padded."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        o = scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.mask is None, enable_gqa=grouped)
        return o.transpose(1, 2).reshape(self.token_ids.numel(), -1)

    def columns(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Packed:
    """All prompts in one row, end to end: no arithmetic for padding."""

    token_ids: Tensor
    position: Tensor
    last_U: Tensor
    padding_U: Tensor
    lengths: tuple[int, ...]
    place_T: Tensor
    """Of each token among the U * P columns of the cache."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key, value = (x[0].transpose(0, 1) for x in (q, k, v))
        return packed_causal_attention(query, key, value, self.lengths, q.shape[3] ** -0.5).flatten(1)

    def columns(self, x: Tensor) -> Tensor:
        kv, size = x.shape[1], x.shape[3]
        found = x.new_zeros(len(self.lengths) * max(self.lengths), kv, size)
        found[self.place_T] = x[0].transpose(0, 1)
        return found.view(len(self.lengths), -1, kv, size).transpose(1, 2)


def padded(prompts: Sequence[Sequence[int]], device: torch.device) -> Padded:
    """The prompts as rows of one length."""
    token_ids_UP, padding_U = padded_left(prompts, device)
    n, longest = token_ids_UP.shape
    column = torch.arange(longest, device=device)
    mask = None
    if bool(padding_U.any()):
        seen = (column <= column[:, None]) & (column >= padding_U[:, None, None])
        # a padding position sees itself, so that its softmax is not over nothing
        mask = (seen | torch.eye(longest, dtype=torch.bool, device=device))[:, None]
    position_UP = (column - padding_U[:, None]).clamp(min=0)
    last_U = torch.arange(1, n + 1, device=device) * longest - 1
    return Padded(token_ids_UP, position_UP, last_U, padding_U, mask)


def packed(prompts: Sequence[Sequence[int]], device: torch.device) -> Packed:
    """The prompts end to end."""
    lengths = tuple(map(len, prompts))
    token_ids_1T = torch.tensor([[token for prompt in prompts for token in prompt]], device=device)
    length_U = torch.tensor(lengths, device=device)
    end_U = length_U.cumsum(0)
    position_T = torch.arange(token_ids_1T.shape[1], device=device) - (end_U - length_U).repeat_interleave(length_U)
    padding_U = length_U.max() - length_U
    first_U = torch.arange(len(lengths), device=device) * length_U.max() + padding_U
    place_T = first_U.repeat_interleave(length_U) + position_T
    return Packed(token_ids_1T, position_T[None], end_U - 1, padding_U, lengths, place_T)

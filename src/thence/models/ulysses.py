"""Attention of rows that are cut over ranks (Ulysses, arXiv 2309.14509).

Every rank holds a piece of the tokens, with all heads. For attention ranks swap: each gets all tokens of a few heads,
attends as one process would, and swaps back. So whatever attention can do (packed rows, windows, soft-capping, sinks)
stays as it is. The swap is torch's own all-to-all, which autograd knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from thence.errors import UserError


@dataclass(frozen=True)
class Piece:
    """Which part of the tokens this rank holds. All parts are equally long and lie in the order of the ranks.

    Args:
        group: the ranks that hold the parts.
        rank: this one's place among them.
        size: how many there are.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    def of(self, tokens: int) -> slice:
        """This rank's part of so many tokens."""
        share = tokens // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


def attend_in_pieces(
    piece: Piece, query: Tensor, key: Tensor, value: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Attention of this rank's tokens to those of all ranks. All of them call it.

    Args:
        query: (n, heads, head size): all heads of this rank's n tokens.
        key: (n, kv heads, head size); kv heads divides heads.
        value: (n, kv heads, value size).
        attend: attention of all tokens; it is given heads / ranks of the heads, in order.

    Returns:
        (n, heads, value size).

    Raises:
        UserError: the heads cannot be dealt evenly to the ranks.
    """
    heads, groups = query.shape[1], key.shape[1]
    if heads % piece.size or (groups % piece.size and piece.size % groups):
        raise UserError(
            f"{heads} attention heads ({groups} for keys and values) cannot be dealt evenly to {piece.size} ranks",
            remedy="set sharding.context to a divisor of the number of heads",
            field="sharding.context",
        )
    if groups < piece.size:  # several ranks attend with the same keys and values
        key, value = (x.repeat_interleave(piece.size // groups, 1) for x in (key, value))
    return _to_tokens(attend(*(_to_heads(x, piece) for x in (query, key, value))), piece)


def _to_heads(x: Tensor, piece: Piece) -> Tensor:
    """(n, heads, size) of this rank's tokens -> (all tokens, heads / ranks, size) of this rank's heads."""
    n, heads, size = x.shape
    by_rank = x.view(n, piece.size, heads // piece.size, size).transpose(0, 1)
    return _swapped(by_rank, piece).flatten(0, 1)


def _to_tokens(x: Tensor, piece: Piece) -> Tensor:
    """(all tokens, heads / ranks, size) -> (n, heads, size)."""
    by_rank = x.unflatten(0, (piece.size, -1))
    return _swapped(by_rank, piece).transpose(0, 1).flatten(1, 2)


def _swapped(x: Tensor, piece: Piece) -> Tensor:
    """Send part i of the first dimension to rank i. Returns what the ranks have sent, in their order."""
    received = all_to_all_single_autograd(x.contiguous(), None, None, piece.group)
    return received.clone()  # waits for it; views of what has not come yet must not reach the C kernels

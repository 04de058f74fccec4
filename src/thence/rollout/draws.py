"""Drawing tokens: temperature, top-k, top-p, and random numbers that belong to a row and a position, not to a batch."""

from __future__ import annotations

import torch
from torch import Tensor

# Constants of splitmix64 (Steele, Lea and Flood 2014), as signed 64-bit integers.
_GOLDEN, _MIX_1, _MIX_2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


def uniforms(seed_B: Tensor, first: int | Tensor, count: int) -> Tensor:
    """One uniform number in [0, 1) for every row and each of ``count`` positions from ``first`` on.

    A counter-based generator: the number depends on the row's seed and the position alone, so that a row's tokens do
    not depend on which rows are sampled beside it.

    Args:
        seed_B: seed of each row, shape (B,), int64.
        first: of all rows, or of each, shape (B,), int64.

    Returns:
        Shape (B, count), float64, with 53 random bits.
    """
    start_B = torch.as_tensor(first, device=seed_B.device).expand_as(seed_B)
    position_BC = start_B[:, None] + torch.arange(1, 1 + count, device=seed_B.device)
    state_BC = _mixed(seed_B)[:, None] + position_BC * _GOLDEN
    return _shifted(_mixed(state_BC), 11).double() * 2.0**-53


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _MIX_1
    x = (x ^ _shifted(x, 27)) * _MIX_2
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch shifts signed integers arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the cumulative distribution, and its log-probability.

    Args:
        logits_BV: float32.
        uniform_B: float64 in [0, 1).
        temperature: the logits are divided by it; 0 takes the likeliest token.

    Returns:
        Tokens (B,), int64; and log-probabilities (B,) of the whole softmax at this temperature (at 1 for greedy),
        which is what the trainer computes. top-p and top-k choose among tokens but do not renormalise it.
    """
    log_p_BV = torch.log_softmax(logits_BV / temperature if temperature > 0 else logits_BV, -1)
    if temperature > 0:
        p_BV = log_p_BV.exp()
        if top_k or top_p < 1:
            p_BV = _truncated(p_BV, top_p, top_k)
        # float64: a float32 sum over a large vocabulary would lose the tail
        cumulative_BV = p_BV.cumsum(-1, dtype=torch.float64)
        threshold_B1 = (uniform_B * cumulative_BV[:, -1])[:, None]
        token_B = (cumulative_BV <= threshold_B1).sum(-1).clamp_(max=logits_BV.shape[1] - 1)
    else:
        token_B = log_p_BV.argmax(-1)
    return token_B, log_p_BV.gather(1, token_B[:, None])[:, 0]


def _truncated(p_BV: Tensor, top_p: float, top_k: int) -> Tensor:
    """Zero all but the top-k tokens, then all but the smallest set whose probability reaches top-p."""
    sorted_BV, index_BV = p_BV.sort(dim=-1, descending=True, stable=True)
    if top_k:
        sorted_BV[:, top_k:] = 0
    if top_p < 1:
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        sorted_BV[before_BV >= top_p * sorted_BV.sum(-1, keepdim=True)] = 0
    return torch.zeros_like(p_BV).scatter(1, index_BV, sorted_BV)

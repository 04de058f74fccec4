"""Causal attention of packed rows over themselves, with ``attention.c`` where that can be built."""

from __future__ import annotations

import ctypes
import functools
import itertools

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from thence.kernels.build import load_library


def packed_causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Each packed row attends to itself alone, causally; exact gradients.

    Args:
        query: (T, heads, head size), rows end to end.
        key: (T, kv heads, head size); kv heads divides heads.
        value: (T, kv heads, value size).
        lengths: tokens of each row; they add up to T.
        scale: of the scores.
        window: most keys that a query sees, its own included; all when absent.
        softcap: scores go through ``softcap * tanh(score / softcap)`` (Gemma 2).
        sinks_H: one more score a head, shape (heads,), that takes its share of the softmax and gives nothing (GPT-OSS).

    Returns:
        (T, heads, value size).
    """
    if window is not None and window >= max(lengths):
        window = None
    simple = window is None and softcap is None and sinks_H is None
    same_type = query.dtype == key.dtype == value.dtype == torch.float32 and query.shape[2] == value.shape[2]
    if simple and query.device.type == "cpu" and same_type and _library(query.shape[2]) is not None:
        return _Packed.apply(query, key, value, lengths, scale)  # type: ignore[return-value]
    rows = zip(*(([part.transpose(0, 1)[None] for part in x.split(lengths)]) for x in (query, key, value)), strict=True)
    if softcap is None and sinks_H is None:
        parts = [_row(q, k, v, scale, window) for q, k, v in rows]
    else:
        parts = [_row_step_by_step(q, k, v, scale, window, softcap, sinks_H) for q, k, v in rows]
    return torch.cat(parts, 2)[0].transpose(0, 1)


def _row(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """One row: (1, heads, n, size) each."""
    n, grouped = q.shape[2], q.shape[1] != k.shape[1]
    mask = None if window is None or n <= window else _seen(n, window, q.device)
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def _row_step_by_step(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None, sinks_H: Tensor | None
) -> Tensor:
    """One row with what torch's own attention leaves out; its scores are held whole."""
    repeats, n = q.shape[1] // k.shape[1], q.shape[2]
    k, v = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_seen(n, window or n, q.device), float("-inf"))
    if sinks_H is not None:
        sinks = sinks_H.to(scores.dtype).reshape(1, -1, 1, 1).expand(1, q.shape[1], n, 1)
        scores = torch.cat([scores, sinks], 3)
    return scores.softmax(3, dtype=torch.promote_types(scores.dtype, torch.float32))[..., :n].to(v.dtype) @ v


def _seen(n: int, window: int, device: torch.device) -> Tensor:
    """Which keys a query sees, (n, n), bool: itself and at most ``window - 1`` before it."""
    position = torch.arange(n, device=device)
    behind = position[:, None] - position
    return (behind >= 0) & (behind < window)


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, lengths, scale):
        library = _library(query.shape[2])
        assert library is not None
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        starts = torch.tensor([0, *itertools.accumulate(lengths)])
        out, logsum = torch.empty_like(query), torch.empty(query.shape[:2])
        places = (x.data_ptr() for x in (query, key, value, starts, out, logsum))
        library.attention_forward(*places, len(lengths), query.shape[1], key.shape[1], scale)
        ctx.save_for_backward(query, key, value, starts, out, logsum)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, *grad_outputs):
        query, key, value, starts, out, logsum = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        places = (x.data_ptr() for x in (query, key, value, starts, out, logsum, grad, dq, dk, dv))
        library = _library(query.shape[2])
        assert library is not None
        library.attention_backward(*places, len(starts) - 1, query.shape[1], key.shape[1], ctx.scale)
        return dq, dk, dv, None, None


@functools.cache
def _library(head_size: int) -> ctypes.CDLL | None:
    library = load_library("attention.c", head_size)
    if library is not None:
        pointer, sizes = ctypes.c_void_p, [ctypes.c_int64] * 3 + [ctypes.c_float]
        library.attention_forward.argtypes = [pointer] * 6 + sizes
        library.attention_backward.argtypes = [pointer] * 10 + sizes
        library.attention_forward.restype = library.attention_backward.restype = None
    return library

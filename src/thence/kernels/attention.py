"""Causal attention of packed rows over themselves, with ``attention.c`` where that can be built."""

from __future__ import annotations

import ctypes
import functools
import itertools

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from thence.kernels.addresses import address
from thence.kernels.build import load_library, refuse_second_derivatives
from thence.kernels.numbers import plain_numbers


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
        out, logsum = _forward(library, query, key, value, starts, scale)
        ctx.save_for_backward(query, key, value, starts, out, logsum)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, *grad_outputs):
        refuse_second_derivatives()
        query, key, value, starts, out, logsum = ctx.saved_tensors
        library = _library(query.shape[2])
        assert library is not None
        saved = (query, key, value, starts, out, logsum, grad_outputs[0].contiguous())
        return *_backward(library, saved, ctx.scale), None, None


def _forward(
    library: ctypes.CDLL, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention and the logarithm of each query's denominator. Raises MemoryError."""
    out, logsum = torch.empty_like(query), query.new_empty(query.shape[:2])
    places = _places(query, key, value, starts, out, logsum)
    if library.attention_forward(*places, len(starts) - 1, query.shape[1], key.shape[1], scale):
        raise MemoryError("no memory for the attention of packed rows")
    return out, logsum


def _backward(library: ctypes.CDLL, saved: tuple[Tensor, ...], scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. Raises MemoryError."""
    query, key, value, starts = saved[:4]
    dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    places = _places(*saved, dq, dk, dv)
    if library.attention_backward(*places, len(starts) - 1, query.shape[1], key.shape[1], scale):
        raise MemoryError("no memory for the gradient of the attention of packed rows")
    return dq, dk, dv


def _places(*tensors: Tensor) -> list[int]:
    """Addresses; the fourth tensor holds where rows start."""
    return [address(x, torch.int64 if i == 3 else torch.float32) for i, x in enumerate(tensors)]


@functools.cache
def _library(head_size: int) -> ctypes.CDLL | None:
    return load_library("attention.c", head_size, _is_torchs)


def _is_torchs(head_size: int, library: ctypes.CDLL) -> bool:
    """Whether results and gradients of a few short rows are torch's, and a NaN does not vanish."""
    pointer, sizes = ctypes.c_void_p, [ctypes.c_int64] * 3 + [ctypes.c_float]
    library.attention_forward.argtypes = [pointer] * 6 + sizes
    library.attention_backward.argtypes = [pointer] * 10 + sizes
    library.attention_forward.restype = library.attention_backward.restype = ctypes.c_int
    lengths, heads, kv, scale = (5, 1, 9), 4, 2, head_size**-0.5
    starts = torch.tensor([0, *itertools.accumulate(lengths)])
    with torch.enable_grad():
        shapes = enumerate((heads, kv, kv))
        inputs = [plain_numbers(sum(lengths), n, head_size, place=i).requires_grad_() for i, n in shapes]
        rows = zip(*(([part.transpose(0, 1)[None] for part in x.split(lengths)]) for x in inputs), strict=True)
        exact = torch.cat([_row(q, k, v, scale, None) for q, k, v in rows], 2)[0].transpose(0, 1)
        upstream = plain_numbers(sum(lengths), heads, head_size, place=9)
        slopes = torch.autograd.grad(exact, inputs, upstream)
    query, key, value = (x.detach() for x in inputs)
    out, logsum = _forward(library, query, key, value, starts, scale)
    ours = _backward(library, (query, key, value, starts, out, logsum, upstream), scale)
    pairs = zip((out, *ours), (exact.detach(), *slopes), strict=True)
    if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs):
        return False
    key = key.clone()
    key[-1] = float("nan")
    return bool(_forward(library, query, key, value, starts, scale)[0][-1].isnan().all())

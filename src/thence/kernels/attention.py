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
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float
) -> Tensor:
    """Each packed row attends to itself alone, causally; exact gradients.

    Args:
        query: (T, heads, head size), rows end to end.
        key, value: (T, kv heads, head size); kv heads divides heads.
        lengths: tokens of each row; they add up to T.
        scale: of the scores.

    Returns:
        (T, heads, head size).
    """
    plain = query.device.type == "cpu" and query.dtype == key.dtype == value.dtype == torch.float32
    if plain and _library(query.shape[2]) is not None:
        return _Packed.apply(query, key, value, lengths, scale)  # type: ignore[return-value]
    grouped = query.shape[1] != key.shape[1]
    q, k, v = ([part.transpose(0, 1)[None] for part in x.split(lengths)] for x in (query, key, value))
    parts = [
        scaled_dot_product_attention(*row, is_causal=True, scale=scale, enable_gqa=grouped)  # pyright: ignore[reportArgumentType]
        for row in zip(q, k, v, strict=True)
    ]
    return torch.cat(parts, 2)[0].transpose(0, 1)


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

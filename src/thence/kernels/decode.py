"""A decoding step's attention, norms and gates: the functions of ``decode.c`` on contiguous float32 tensors."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import pad, rms_norm, silu

from thence.kernels.build import load_library
from thence.kernels.numbers import plain_numbers

LANE = 16
"""Columns of a block of the cache, as in ``decode.c``."""


class DecodeKernels:
    """The compiled functions for one head size, on contiguous float32 tensors."""

    def __init__(self, library: ctypes.CDLL):
        self._attend, self._rms_norm, self._swiglu = library.attend, library.rms_norm, library.swiglu
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._attend.argtypes = [pointer] * 8 + [number] * 5 + [ctypes.c_float]
        self._rms_norm.argtypes = [pointer] * 2 + [number] * 2 + [ctypes.c_float]
        self._swiglu.argtypes = [pointer] * 2 + [number] * 2
        self._attend.restype = ctypes.c_int
        self._rms_norm.restype = self._swiglu.restype = None

    def attend(
        self,
        qkv: Tensor,
        keys: Tensor,
        values: Tensor,
        cos: Tensor,
        sin: Tensor,
        place: Tensor,
        first: Tensor,
        column: int,
    ) -> Tensor:
        """Append one token a row to the cache in place and attend to all of its row; see ``decode.c``.

        Args:
            qkv: (rows, (heads + 2 kv) * head size).
            keys: (places, kv, blocks, head size, ``LANE``); see :func:`in_blocks`.
            values: (places, kv, blocks * ``LANE``, head size).
            cos, sin: (positions, head size / 2).
            place: where in the cache each row is, (rows,), int64.
            first: first column of each row that is no padding, (rows,), int64.
            column: where the token goes.

        Returns:
            (rows, heads * head size).

        Raises:
            MemoryError: no room for a row's scores.
        """
        rows, (_, kv, blocks, head_size, _) = len(qkv), keys.shape
        heads = qkv.shape[1] // head_size - 2 * kv
        out = qkv.new_empty(rows, heads * head_size)
        places = (t.data_ptr() for t in (qkv, keys, values, cos, sin, place, first, out))
        if self._attend(*places, rows, heads, kv, blocks, column, head_size**-0.5):
            raise MemoryError("no memory for the scores of a decoding step")
        return out

    def rms_norm(self, x: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm of every row, without weights."""
        out = torch.empty_like(x)
        self._rms_norm(x.data_ptr(), out.data_ptr(), *x.shape, eps)
        return out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """``silu(gate) * up`` of rows that hold gate and up side by side."""
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, width)
        self._swiglu(gate_up.data_ptr(), out.data_ptr(), rows, width)
        return out


def in_blocks(keys: Tensor) -> Tensor:
    """Keys (..., columns, head size) as the kernels want them: (..., blocks, head size, ``LANE``), zeros at the end."""
    blocks = -(-keys.shape[-2] // LANE)
    padded = pad(keys, (0, 0, 0, blocks * LANE - keys.shape[-2]))
    return padded.unflatten(-2, (blocks, LANE)).transpose(-2, -1).contiguous()


def decode_kernels(head_size: int) -> DecodeKernels | None:
    """The kernels for a head size, or None where they cannot be built."""
    library = load_library("decode.c", head_size, _is_torchs)
    return None if library is None else DecodeKernels(library)


def _is_torchs(head_size: int, library: ctypes.CDLL) -> bool:
    """Whether a decoding step's attention, norm and gate are torch's, and a NaN does not vanish."""
    kernels = DecodeKernels(library)
    x, gates = plain_numbers(3, 37), plain_numbers(3, 50, place=1)
    up = gates[:, 25:]
    if not torch.allclose(kernels.rms_norm(x, 1e-6), rms_norm(x, x.shape[-1:], eps=1e-6), rtol=1e-4, atol=1e-5):
        return False
    if not torch.allclose(kernels.swiglu(gates), silu(gates[:, :25]) * up, rtol=1e-4, atol=1e-5):
        return False
    heads, kv, capacity, column = 4, 2, 2 * LANE, LANE + 3
    qkv = plain_numbers(2, (heads + 2 * kv) * head_size, place=2)
    first, place = torch.tensor([0, 3]), torch.tensor([2, 0])  # of a cache of three places
    angles = plain_numbers(capacity, head_size // 2, place=3)
    past_k, past_v = (plain_numbers(3, kv, capacity, head_size, place=i) for i in (4, 5))
    keys, values = in_blocks(past_k), past_v.clone()
    out = kernels.attend(qkv, keys, values, angles.cos(), angles.sin(), place, first, column)

    heads_of_row = qkv.reshape(2, heads + 2 * kv, head_size)
    turned = torch.stack([_turned(heads_of_row[r], angles[column - int(first[r])]) for r in range(2)])
    past_k[place, :, column], past_v[place, :, column] = turned[:, heads : heads + kv], heads_of_row[:, heads + kv :]
    for r in range(2):
        seen = slice(int(first[r]), column + 1)
        k, v = (p[place[r], :, seen].repeat_interleave(heads // kv, 0) for p in (past_k, past_v))
        share = (k @ turned[r, :heads, :, None]).squeeze(-1).mul(head_size**-0.5).softmax(-1)
        exact = (share[:, None] @ v).reshape(-1)
        if not torch.allclose(out[r], exact, rtol=1e-4, atol=1e-5):
            return False
    keys[:, :, 1, :, 2] = float("nan")
    spoiled = kernels.attend(qkv, keys, values, angles.cos(), angles.sin(), place, first, column)
    x[1, 3] = gates[1, 3] = float("nan")
    return bool(
        spoiled.isnan().all() and kernels.rms_norm(x, 1e-6)[1].isnan().all() and kernels.swiglu(gates)[1, 3].isnan()
    )


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    """Heads (n, head size) turned by a position's angles (head size / 2)."""
    left, right = x.chunk(2, -1)
    return torch.cat([left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], -1)

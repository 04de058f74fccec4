"""A decoding step's attention, norms and gates: the functions of ``decode.c`` on contiguous float32 tensors."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from thence.kernels.build import load_library


class DecodeKernels:
    """The compiled functions for one head size, on contiguous float32 tensors."""

    def __init__(self, library: ctypes.CDLL):
        self._attend, self._rms_norm, self._swiglu = library.attend, library.rms_norm, library.swiglu
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._attend.argtypes = [pointer] * 7 + [number] * 5 + [ctypes.c_float]
        self._rms_norm.argtypes = [pointer] * 2 + [number] * 2 + [ctypes.c_float]
        self._swiglu.argtypes = [pointer] * 2 + [number] * 2
        for function in (self._attend, self._rms_norm, self._swiglu):
            function.restype = None

    def attend(
        self, qkv: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, first: Tensor, column: int
    ) -> Tensor:
        """Append one token a row to the cache in place and attend to all of its row; see ``decode.c``.

        Args:
            qkv: (rows, (heads + 2 kv) * head size).
            keys: (rows, kv, head size, capacity).
            values: (rows, kv, capacity, head size).
            cos, sin: (positions, head size / 2).
            first: first column of each row that is no padding, (rows,), int64.
            column: where the token goes.

        Returns:
            (rows, heads * head size).
        """
        rows, kv, head_size, capacity = keys.shape
        heads = qkv.shape[1] // head_size - 2 * kv
        out = torch.empty(rows, heads * head_size)
        places = (t.data_ptr() for t in (qkv, keys, values, cos, sin, first, out))
        self._attend(*places, rows, heads, kv, capacity, column, head_size**-0.5)
        return out

    def rms_norm(self, x: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm of every row, without weights."""
        out = torch.empty_like(x)
        self._rms_norm(x.data_ptr(), out.data_ptr(), *x.shape, eps)
        return out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """``silu(gate) * up`` of rows that hold gate and up side by side."""
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(rows, width)
        self._swiglu(gate_up.data_ptr(), out.data_ptr(), rows, width)
        return out


def decode_kernels(head_size: int) -> DecodeKernels | None:
    """The kernels for a head size, or None where they cannot be built."""
    library = load_library("decode.c", head_size)
    return None if library is None else DecodeKernels(library)

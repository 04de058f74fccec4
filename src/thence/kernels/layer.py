"""Norm, gate and rotary embedding of a Llama-like layer with exact gradients: the functions of ``layer.c``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from thence.kernels.addresses import address
from thence.kernels.build import load_library, refuse_second_derivatives
from thence.kernels.numbers import plain_numbers

PARTS = 16
"""Sums of the gradient of a norm's weight that are made side by side; a number of its own, since the last bits of the
gradient follow from it and must not follow from the number of threads."""


class LayerKernels:
    """The compiled functions for one head size, on float32 tensors of a CPU; all have gradients."""

    def __init__(self, library: ctypes.CDLL, head_size: int):
        self.library, self.head_size = library, head_size
        pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        library.norm_forward.argtypes = [pointer] * 4 + [number] * 2 + [real]
        library.norm_backward.argtypes = [pointer] * 6 + [number] * 3
        library.gate_forward.argtypes = [pointer] * 3 + [number]
        library.gate_backward.argtypes = [pointer] * 5 + [number]
        library.turn_heads.argtypes = [pointer] * 4 + [number] * 2 + [real]
        for name in ("norm_forward", "norm_backward", "gate_forward", "gate_backward", "turn_heads"):
            getattr(library, name).restype = None

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm over the last dimension, times ``weight``; shapes (..., D), (D,)."""
        return _Norm.apply(x, weight, eps, self.library)  # type: ignore[return-value]

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """``silu(gate) * up``, of one shape."""
        return _Gated.apply(gate, up, self.library)  # type: ignore[return-value]

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Heads turned by their positions' angles: x (T, heads, head size), cos and sin (T, head size).

        The two halves of ``cos`` and ``sin`` are taken to be equal, as they are where each angle turns a pair.
        """
        return _Turned.apply(x, cos, sin, self.library)  # type: ignore[return-value]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, library: ctypes.CDLL) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y, width = torch.empty_like(x), x.shape[-1]
        inverse = x.new_empty(x.numel() // width)
        library.norm_forward(*_places(x, weight, y, inverse), len(inverse), width, eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.library = library
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        x, weight, inverse = ctx.saved_tensors
        grad, dx = grad_outputs[0].contiguous(), torch.empty_like(x)
        dweight = x.new_zeros(PARTS, len(weight))
        places = _places(x, weight, inverse, grad, dx, dweight)
        ctx.library.norm_backward(*places, len(inverse), len(weight), PARTS)
        return dx, dweight.sum(0) if ctx.needs_input_grad[1] else None, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, library: ctypes.CDLL) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        library.gate_forward(*_places(gate, up, out), gate.numel())
        ctx.save_for_backward(gate, up)
        ctx.library = library
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        gate, up = ctx.saved_tensors
        grad, dgate, dup = grad_outputs[0].contiguous(), torch.empty_like(gate), torch.empty_like(up)
        ctx.library.gate_backward(*_places(gate, up, grad, dgate, dup), gate.numel())
        return dgate, dup, None


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, library: ctypes.CDLL) -> Tensor:
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        out = torch.empty_like(x)
        library.turn_heads(*_places(x, cos, sin, out), *x.shape[:2], 1.0)
        ctx.save_for_backward(cos, sin)
        ctx.library = library
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        grad = grad_outputs[0].contiguous()
        back = torch.empty_like(grad)
        ctx.library.turn_heads(*_places(grad, *ctx.saved_tensors, back), *grad.shape[:2], -1.0)
        return back, None, None, None


def _places(*tensors: Tensor) -> list[int]:
    return [address(tensor) for tensor in tensors]


def layer_kernels(head_size: int) -> LayerKernels | None:
    """The kernels for a head size, or None where they cannot be built."""
    library = load_library("layer.c", head_size, _is_torchs)
    return None if library is None else LayerKernels(library, head_size)


def _is_torchs(head_size: int, library: ctypes.CDLL) -> bool:
    """Whether results and gradients are torch's, and a NaN does not vanish."""
    kernels = LayerKernels(library, head_size)
    x, weight = plain_numbers(37, 53), 1 + plain_numbers(53, place=1) / 2
    gate, up = 3 * plain_numbers(7, 41, place=2), plain_numbers(7, 41, place=3)
    heads, angle = plain_numbers(5, 3, head_size, place=4), plain_numbers(5, head_size // 2, place=5)
    cos, sin = (torch.cat([part, part], 1) for part in (angle.cos(), angle.sin()))
    trials: list[tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (lambda a, b: kernels.norm(a, b, 1e-3), lambda a, b: rms_norm(a, a.shape[-1:], b, 1e-3), (x, weight)),
        (kernels.gated, lambda a, b: silu(a) * b, (gate, up)),
        (lambda a: kernels.turned(a, cos, sin), lambda a: plainly_turned(a, cos, sin), (heads,)),
    ]
    for ours, torchs, inputs in trials:
        found, expected = _with_gradients(ours, inputs), _with_gradients(torchs, inputs)
        if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, expected, strict=True)):
            return False
        for place, spoiled in enumerate(inputs):
            inputs_now = [spoiled.clone() if i == place else other for i, other in enumerate(inputs)]
            inputs_now[place].view(-1)[3] = float("nan")
            if torch.isnan(ours(*inputs_now)).sum() != torch.isnan(torchs(*inputs_now)).sum():
                return False
    return True


def plainly_turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What :meth:`LayerKernels.turned` gives, in torch."""
    left, right = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None]


def _with_gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves)
        slopes = torch.autograd.grad(out, leaves, plain_numbers(*out.shape, place=9))
    return [out.detach(), *slopes]

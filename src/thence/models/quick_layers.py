"""Layers of the Llama family with the C kernels of :mod:`thence.kernels.layer`, while rows are packed on a CPU.

At the sizes that a CPU can train, half of a step goes to norms, gates and rotary embeddings: torch makes five to ten
passes over memory for each. The modules stay, and with them adapters, hooks and shards; their ``forward`` is replaced
where the class is known, and does as before where a tensor is not plain float32 on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from thence.kernels.layer import LayerKernels, layer_kernels, plainly_turned

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
Forward = Callable[..., Any]
Attend = Callable[..., tuple[Tensor, None]]


@contextmanager
def quick_layers(model: nn.Module, attend: Attend) -> Iterator[None]:
    """While it lasts, known modules of the model run with kernels; nothing changes where there are none.

    Args:
        attend: attention of packed rows, by transformers' attention interface.
    """
    replaced = list(_replacements(model, attend))
    for module, forward in replaced:
        module.forward = forward
    try:
        yield
    finally:
        for module, _ in replaced:
            del module.forward  # the class's own is seen again


def _replacements(model: nn.Module, attend: Attend) -> Iterator[tuple[nn.Module, Forward]]:
    known = [(module, part) for module in model.modules() if (part := _part(module)) is not None]
    head_size = next((module.head_dim for module, part in known if part == "Attention"), None)
    kernels = None if head_size is None else layer_kernels(int(head_size))  # pyright: ignore[reportArgumentType]
    if kernels is None:
        return
    for module, part in known:
        if "forward" in vars(module):  # another's replacement is left alone
            continue
        if part == "Attention":
            yield module, _attention(module, module.forward, kernels, attend)
        else:
            yield module, {"RMSNorm": _norm, "MLP": _mlp}[part](module, module.forward, kernels)


def _part(module: Any) -> str | None:
    """Which part of a known layer a module is; None: another one."""
    kind = type(module)
    if not kind.__module__.startswith("transformers.models."):
        return None
    for part in ("RMSNorm", "MLP", "Attention"):
        if kind.__name__ in [family + part for family in FAMILIES]:
            return None if part == "MLP" and module.config.hidden_act != "silu" else part
    return None


def _plain(*tensors: Tensor) -> bool:
    on_cpu = all(type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" for x in tensors)
    return on_cpu and all(x.dtype == torch.float32 for x in tensors) and not torch.is_autocast_enabled("cpu")


def _norm(module: Any, before: Forward, kernels: LayerKernels) -> Forward:
    def forward(hidden_states: Tensor) -> Tensor:
        if not _plain(hidden_states, module.weight):
            return before(hidden_states)
        return kernels.norm(hidden_states, module.weight, module.variance_epsilon)

    return forward


def _is_silu(gate: Any) -> bool:
    """Whether a gate is what its configuration says: nobody has replaced it or looks into it."""
    hooked = any((gate._forward_hooks, gate._forward_pre_hooks, gate._backward_hooks, gate._backward_pre_hooks))
    return type(gate) in (nn.SiLU, type(ACT2FN["silu"])) and not hooked


def _mlp(module: Any, before: Forward, kernels: LayerKernels) -> Forward:
    def forward(x: Tensor) -> Tensor:
        if not _plain(x):
            return before(x)
        gate, up = module.gate_proj(x), module.up_proj(x)
        known = _plain(gate, up) and _is_silu(module.act_fn)
        return module.down_proj(kernels.gated(gate, up) if known else module.act_fn(gate) * up)

    return forward


def _attention(module: Any, before: Forward, kernels: LayerKernels, attend: Attend) -> Forward:
    norms = (getattr(module, "q_norm", None), getattr(module, "k_norm", None))
    windowed = getattr(module, "sliding_window", None) or getattr(module.config, "sliding_window", None)

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        usual = "packed_lengths" not in kwargs or past_key_values is not None or windowed
        if usual or position_embeddings is None or not _plain(hidden_states):
            return before(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        shape = (hidden_states.shape[1], -1, module.head_dim)
        q, k, v = (part(hidden_states).view(shape) for part in (module.q_proj, module.k_proj, module.v_proj))
        q, k = (x if norm is None else norm(x) for x, norm in zip((q, k), norms, strict=True))
        cos, sin = (x[0] for x in position_embeddings)
        # a layer may have heads of another size, and a quantized projection numbers of another type
        known = _plain(q, k, cos, sin) and cos.shape == sin.shape == (shape[0], kernels.head_size)
        q, k = ((kernels.turned if known else plainly_turned)(x, cos, sin) for x in (q, k))
        dropout = module.attention_dropout if module.training else 0.0
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        out, weights = attend(module, *heads, attention_mask, scaling=module.scaling, dropout=dropout, **kwargs)
        return module.o_proj(out.reshape(1, shape[0], -1)), weights

    return forward

"""A decoder for the Llama family (Llama, Mistral, Qwen2, Qwen3) that does a token's arithmetic and little else.

At the sizes that a CPU can train, the time of a decoding step goes to the number of operations, not to arithmetic.
So the weights of a layer are laid side by side (q, k, v; gate, up), the norms' weights are multiplied into them,
the residual is added by the matrix product, and keys and values are written in place into a preallocated cache, where a
row stays until the end: rows that have ended are passed over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from thence.kernels.decode import (
    LANE,
    DecodeKernels,
    Matrices,
    Rows,
    WholeStep,
    decode_kernels,
    keys_in_blocks,
    values_in_blocks,
)
from thence.rollout.decoders import without_autocast
from thence.rollout.prompts import Layout, packed, padded

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
PACK_FROM = 1e11
"""About a second of a processor core. Below it padding costs less than its absence would change: other sums
have other last bits."""
WHOLE_STEP = 2_000_000
"""Weights up to which a step runs in one C function. Every thread reads all of them, from its core's cache; with 5.6M a
step of few rows is slower than with torch's products (`benchmarks/whole_step.py`)."""


def is_plain_llama(model: Any) -> bool:
    """Whether the model is of the family and uses nothing that this decoder leaves out.

    The decoder reads weights, not modules: an adapter, a parametrization, a quantized layer or a hook would be passed
    over.
    """
    config = model.config
    if config.model_type not in FAMILIES or type(model).__name__ not in CLASSES:
        return False
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    attention = model.model.layers[0].self_attn
    return (
        config.hidden_act == "silu"
        and not windowed
        and not getattr(config, "mlp_bias", False)
        and getattr(attention.o_proj, "bias", None) is None
        and len({getattr(attention, f"{part}_proj").bias is None for part in "qkv"}) == 1
        and getattr(model.lm_head, "bias", None) is None
        # other kinds of rotary embedding depend on the length of what is read
        and (config.rope_parameters or {}).get("rope_type", "default") in ("default", "linear", "llama3", "yarn")
        and all(type(module) in (nn.Linear, nn.Embedding) for module in _read_from(model))
        and all(p.dtype == torch.float32 for p in model.parameters())
        and not any(_is_changed(part) for layer in model.model.layers for part in layer.modules())
        and not any(map(_is_changed, (model, model.model, *_around_the_layers(model))))
    )


def _around_the_layers(model: Any) -> list[nn.Module]:
    inner = model.model
    return [inner.embed_tokens, inner.rotary_emb, inner.norm, model.lm_head]


def _is_changed(module: nn.Module) -> bool:
    """Whether somebody has hooks on a module that change or see what it gives, or has replaced its forward pass."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _read_from(model: Any) -> list[nn.Module]:
    """The modules whose ``weight`` this decoder reads, norms aside."""
    found = [model.model.embed_tokens, model.lm_head]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        found += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        found += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return found


@dataclass(frozen=True)
class Layer:
    """One layer's weights, made ready: transposed for ``addmm``, norms multiplied in."""

    qkv: Tensor
    qkv_bias: Tensor | None
    out_t: Tensor
    gate_up: Tensor
    down_t: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None


Attend = Callable[[Layer, tuple[Tensor, Tensor], Tensor], Tensor]
"""Appends one token a row (its q, k, v) to a layer's cache and gives what it attended to, (rows, heads * head size)."""


def _in_float32(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of a decoder: autocast, which would give kernels and cache other numbers, is off while it runs."""

    @functools.wraps(method)
    def run(self: LlamaDecoder, *arguments: Any) -> Tensor:
        with without_autocast(self.device):
            return method(self, *arguments)

    return run


class LlamaDecoder:
    """See the module. Rows share columns of the cache: prompts are padded on the left, responses lie side by side.

    On a CPU with a C compiler, attention, norms and gates of a step run in ``kernels/decode.c``, and the whole step
    where the model is small; else in torch.

    Args:
        pack_from: FLOPs of padding from which on prompts of different lengths are read without any.
    """

    def __init__(self, model: Any, pack_from: float = PACK_FROM):
        config = model.config
        self.device = next(model.parameters()).device
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        self.embedding = model.model.embed_tokens.weight
        self.head = model.lm_head.weight * model.model.norm.weight
        self.layers = [_ready(layer) for layer in model.model.layers]
        self.rotary = model.model.rotary_emb
        plain = self.device.type == "cpu" and self.layers[0].q_norm is None
        self.kernels: DecodeKernels | None = decode_kernels(self.head_size) if plain else None
        self.pack_from = pack_from
        self.parameters = sum(p.numel() for layer in model.model.layers for p in layer.parameters())
        self.whole: WholeStep | None = None
        self.length = 0

    @_in_float32
    def prefill(self, prompts: list[list[int]], repeat_U: Tensor, max_tokens: int) -> Tensor:
        layout = self._layout(prompts)
        rows = torch.arange(len(prompts), device=self.device).repeat_interleave(repeat_U.to(self.device))
        self.length = max(map(len, prompts))
        self._make_rotary(self.length + max_tokens)
        self.cache = [self._room(len(rows), self.length + max_tokens) for _ in self.layers]
        cos, sin = self.cos[layout.position][:, :, None], self.sin[layout.position][:, :, None]
        x = self.embedding[layout.token_ids].flatten(0, 1)
        for layer, (keys, values) in zip(self.layers, self.cache, strict=True):
            qkv = self._qkv(layer, x).view(*layout.token_ids.shape, -1, self.head_size)
            q, k, v = self._turned(layer, qkv, cos, sin)
            k_UP, v_UP = layout.columns(k), layout.columns(v)
            if self.kernels is None:
                keys[:, :, : self.length], values[:, :, : self.length] = k_UP[rows], v_UP[rows]
            else:
                blocks = -(-self.length // LANE)
                keys[:, :blocks], values[:, :blocks] = keys_in_blocks(k_UP)[rows], values_in_blocks(v_UP)[rows]
            x = self._finish(layer, x, layout.attend(q, k, v))
        self.padding_B = layout.padding_U[rows]
        self.place_B = torch.arange(len(rows), device=self.device)
        self._make_mask()
        self.whole = self._whole_step()
        return self._logits(x[layout.last_U])[rows]

    def _layout(self, prompts: list[list[int]]) -> Layout:
        """Prompts end to end where that saves enough arithmetic on a CPU; else padded.

        On other devices the attention of each prompt would be a launch, and arithmetic is cheap.
        """
        padding = len(prompts) * max(map(len, prompts)) - sum(map(len, prompts))
        pack = self.device.type == "cpu" and padding > 0 and 2 * self.parameters * padding >= self.pack_from
        return packed(prompts, self.device) if pack else padded(prompts, self.device)

    @_in_float32
    def step(self, token_B: Tensor) -> Tensor:
        at = self.length
        if at >= len(self.cos):
            raise IndexError(f"the cache has room for {len(self.cos)} tokens a row, and all of them are taken")
        self.length += 1
        if self.whole is not None:
            return self.whole(token_B, self._rows(at))
        x = self.embedding[token_B]
        attend = self._attend_torch(at) if self.kernels is None else self._attend_kernel(at)
        for layer, cache in zip(self.layers, self.cache, strict=True):
            x = self._finish(layer, x, attend(layer, cache, self._qkv(layer, x)))
        return self._logits(x)

    def keep(self, row_K: Tensor) -> None:
        self.padding_B = self.padding_B[row_K]
        if self.kernels is not None:  # the kernel finds each row where it is; moving them would cost most of a step
            self.place_B = self.place_B[row_K]
            return
        for i, old in enumerate(self.cache):
            new = self._room(len(row_K), self.cos.shape[0])
            for emptied, held in zip(new, old, strict=True):
                emptied[:, :, : self.length] = held[row_K, :, : self.length]
            self.cache[i] = new
        self._make_mask()

    def _room(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """An empty cache of one layer: keys and values. The kernels want them in blocks."""
        if self.kernels is None:
            shape = (rows, self.kv_heads, columns, self.head_size)
            return self.cos.new_empty(shape), self.cos.new_empty(shape)
        shape = (rows, -(-columns // LANE), self.kv_heads)
        return self.cos.new_empty(*shape, self.head_size, LANE), self.cos.new_empty(*shape, LANE, self.head_size)

    def _whole_step(self) -> WholeStep | None:
        """The step in one function, with this cache; None where torch's matrix products are better or needed."""
        if self.kernels is None or self.parameters + 2 * self.head.numel() > WHOLE_STEP:
            return None
        layers = [
            Matrices(layer.qkv, layer.qkv_bias, layer.out_t.T, layer.gate_up, layer.down_t.T) for layer in self.layers
        ]
        return WholeStep(self.kernels, self.embedding, layers, self.head, self.cache, self.eps)

    def _rows(self, column: int) -> Rows:
        return Rows(self.cos, self.sin, self.place_B, self.padding_B, column)

    def _qkv(self, layer: Layer, x: Tensor) -> Tensor:
        return linear(self._norm(x), layer.qkv, layer.qkv_bias)

    def _attend_kernel(self, at: int) -> Attend:
        kernels, rows = self.kernels, self._rows(at)
        assert kernels is not None
        return lambda layer, cache, qkv: kernels.attend(qkv, *cache, rows)

    def _attend_torch(self, at: int) -> Attend:
        if self.mask is None:
            cos, sin, mask = self.cos[at], self.sin[at], None
        else:
            position_B = at - self.padding_B
            cos, sin = self.cos[position_B][:, None, None], self.sin[position_B][:, None, None]
            mask = self.mask[:, :, :, : at + 1]

        def attend(layer: Layer, cache: tuple[Tensor, Tensor], qkv: Tensor) -> Tensor:
            keys, values = cache
            q, k, v = self._turned(layer, qkv.view(len(qkv), 1, -1, self.head_size), cos, sin)
            keys[:, :, at : at + 1], values[:, :, at : at + 1] = k, v
            seen = keys[:, :, : at + 1], values[:, :, : at + 1]
            grouped = self.heads != self.kv_heads
            return scaled_dot_product_attention(q, *seen, attn_mask=mask, enable_gqa=grouped).reshape(len(qkv), -1)

        return attend

    def _turned(self, layer: Layer, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normed and turned by their positions, and values: (rows, heads, tokens, size)."""
        qk, v = qkv[:, :, : self.heads + self.kv_heads], qkv[:, :, self.heads + self.kv_heads :]
        if layer.q_norm is not None:
            q = rms_norm(qk[:, :, : self.heads], (self.head_size,), layer.q_norm, self.eps)
            k = rms_norm(qk[:, :, self.heads :], (self.head_size,), layer.k_norm, self.eps)
            qk = torch.cat([q, k], 2)
        half = self.head_size // 2
        turned = torch.empty_like(qk)
        torch.addcmul(qk[..., :half] * cos, qk[..., half:], sin, value=-1, out=turned[..., :half])
        torch.addcmul(qk[..., half:] * cos, qk[..., :half], sin, out=turned[..., half:])
        turned = turned.transpose(1, 2)
        return turned[:, : self.heads], turned[:, self.heads :], v.transpose(1, 2)

    def _finish(self, layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
        x = torch.addmm(x, attended, layer.out_t)
        gate_up = linear(self._norm(x), layer.gate_up)
        if self.kernels is not None:
            return torch.addmm(x, self.kernels.swiglu(gate_up), layer.down_t)
        gate, up = gate_up.chunk(2, -1)
        return torch.addmm(x, silu(gate).mul_(up), layer.down_t)

    def _norm(self, x: Tensor) -> Tensor:
        return rms_norm(x, x.shape[-1:], eps=self.eps) if self.kernels is None else self.kernels.rms_norm(x, self.eps)

    def _logits(self, x: Tensor) -> Tensor:
        return linear(self._norm(x.contiguous()), self.head).float()

    def _make_rotary(self, length: int) -> None:
        position = torch.arange(length, device=self.device)[None]
        cos, sin = self.rotary(self.embedding, position)
        half = self.head_size // 2
        self.cos, self.sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    def _make_mask(self) -> None:
        """Additive mask of the padding columns, or None where no row has any; then all rows share positions too."""
        if self.kernels is not None or not bool(self.padding_B.any()):
            self.mask = None
            return
        column = torch.arange(self.cos.shape[0], device=self.device)
        hidden = column < self.padding_B[:, None]
        self.mask = self.cos.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None, None]


def _ready(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    before, after = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    biases = [part.bias for part in parts if part.bias is not None]
    return Layer(
        qkv=torch.cat([part.weight for part in parts]) * before,
        qkv_bias=torch.cat(biases) if biases else None,
        out_t=attention.o_proj.weight.T,
        gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) * after,
        down_t=mlp.down_proj.weight.T,
        q_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        k_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
    )

"""Memory of one rank, planned: every line with the arithmetic that it came from.

What autograd keeps for the layers is the sum over the tensors that a gated, pre-norm transformer block saves for its
backward pass when attention is fused (no matrix of scores); a test compares it with what torch really saves.
Temporary buffers, fragmentation, the allocator's cache and the libraries themselves are not in it: leave a margin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from thence.accounting.flops import Counts

Phase = Literal["always", "training", "rollout"]
LOGIT_BYTES = 32 * 2**20
"""Logits that the fused objective holds at a time."""


@dataclass(frozen=True, slots=True)
class Line:
    """One holder of memory."""

    name: str
    bytes: int
    arithmetic: str
    phase: Phase


@dataclass(frozen=True, slots=True)
class Memory:
    """The lines of one rank. Training and sampling take turns, so the peak is that of the larger."""

    lines: tuple[Line, ...]

    @property
    def peak(self) -> int:
        """Bytes held at the worst moment."""
        by_phase = {phase: self._sum(phase) for phase in ("always", "training", "rollout")}
        return by_phase["always"] + max(by_phase["training"], by_phase["rollout"])

    def _sum(self, phase: str) -> int:
        return sum(line.bytes for line in self.lines if line.phase == phase)


def state_memory(counts: Counts, compute_bytes: int = 4, ranks: int = 1, sharded: bool = False) -> tuple[Line, ...]:
    """Float32 master weights, gradients and AdamW moments, and the weights in the compute type.

    Args:
        compute_bytes: 4 for float32, 2 for bfloat16, which keeps a second, rounded copy of the weights.
        ranks: data-parallel ranks.
        sharded: FSDP2: every rank keeps its share of the state and gathers one layer (and embedding) at a time.
    """
    share = ranks if sharded else 1
    n, by = counts.total, f" / {ranks} ranks" if sharded else ""
    lines = [
        Line("weights", -(-n * 4 // share), f"{n:,} parameters x 4 B (float32){by}", "always"),
        Line("AdamW moments", -(-n * 8 // share), f"{n:,} parameters x 2 x 4 B{by}", "always"),
        Line("gradients", -(-n * 4 // share), f"{n:,} parameters x 4 B{by}", "training"),
    ]
    if sharded:
        unit = max(counts.per_layer, counts.embedding + counts.head)
        lines.append(_both("gathered weights", unit * compute_bytes, f"largest unit {unit:,} x {compute_bytes} B"))
    elif compute_bytes < 4:
        lines.append(_both("weights, rounded", n * compute_bytes, f"{n:,} parameters x {compute_bytes} B"))
    return tuple(lines)


def activation_memory(counts: Counts, tokens: int, compute_bytes: int = 4, checkpointing: bool = False) -> Line:
    """What the backward pass needs of one micro-batch.

    A layer saves, a token: 4 H float32 numbers for its two norms and, in the compute type, the inputs of its linear
    maps (2 H, or 5 H under autocast, which rounds once for each of q, k, v, gate and up), queries and attention output
    (2 q), keys and values (2 kv) and 4 I in the gated MLP. With checkpointing every layer keeps its input (H float32
    numbers) and one layer at a time is whole.

    Args:
        tokens: tokens of a micro-batch, padding included.
    """
    hidden, inputs = counts.hidden, 5 if compute_bytes == 2 else 2
    wide = inputs * hidden + 2 * counts.head_dim * (counts.heads + counts.kv_heads) + 4 * counts.intermediate
    layer = 16 * hidden + compute_bytes * wide
    text = f"{tokens:,} tokens x {counts.layers} layers x {layer:,} B"
    size = tokens * counts.layers * layer
    if checkpointing:
        size = tokens * (counts.layers * 4 * hidden + layer)
        text = f"{tokens:,} tokens x ({counts.layers} layer inputs x {4 * hidden:,} B + one layer {layer:,} B)"
    return Line("activations", size, text, "training")


def logit_memory(counts: Counts, tokens: int) -> tuple[Line, ...]:
    """The fused objective: one chunk of float32 logits at a time, and the output head's gradient beside the sum."""
    rows = min(tokens, max(1, LOGIT_BYTES // (4 * counts.vocab)))
    chunk = f"{rows:,} tokens x {counts.vocab:,} words x 3 x 4 B (logits, probabilities, their gradient)"
    head = f"{counts.vocab:,} x {counts.hidden:,} x 2 x 4 B (before and after scaling)"
    return (
        Line("logits, one chunk", rows * counts.vocab * 12, chunk, "training"),
        Line("output head's gradient", counts.vocab * counts.hidden * 8, head, "training"),
    )


def rollout_memory(counts: Counts, rows: int, length: int, cache_bytes: int = 4) -> tuple[Line, ...]:
    """The sampler: its rearranged copy of the weights, the cache for the longest row, and one step's logits.

    Args:
        rows: responses sampled in parallel on this rank.
        length: prompt and response tokens of the longest row.
        cache_bytes: bytes of a number in the weights' copy and the cache; the native sampler works in float32.
    """
    copied = counts.matmul + counts.vocab * counts.hidden
    per_token = 2 * counts.layers * counts.kv_heads * counts.head_dim * cache_bytes
    cache = f"{rows:,} rows x {length:,} tokens x {per_token:,} B (2 x {counts.layers} layers x {counts.kv_heads} heads"
    cache += f" x {counts.head_dim} x {cache_bytes} B)"
    logits = f"{rows:,} rows x {counts.vocab:,} tokens x 3 x 4 B (logits, probabilities, their running sum)"
    return (
        Line("sampler's weights", copied * cache_bytes, f"{copied:,} x {cache_bytes} B (layers and head)", "rollout"),
        Line("key-value cache", rows * length * per_token, cache, "rollout"),
        Line("sampling logits", rows * counts.vocab * 12, logits, "rollout"),
    )


def readable(size: float) -> str:
    """Bytes in GiB or MiB, for people."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _both(name: str, size: int, text: str) -> Line:
    return Line(name, size, text, "always")

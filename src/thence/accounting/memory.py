"""Memory of one rank, planned: every line with the arithmetic that it came from.

What autograd keeps for the layers is the sum over the tensors that a gated, pre-norm transformer block saves for its
backward pass when attention is fused (no matrix of scores); a test compares it with what torch really saves.
Temporary buffers, fragmentation, the allocator's cache and the libraries themselves are not in it: leave a margin.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from thence.accounting.flops import Counts, recomputed_layers
from thence.accounting.layout import Layout, is_cut

Phase = Literal["always", "training", "loss", "sum", "rollout", "host", "loading"]
"""When it is held. ``loading``: while the model is opened, before all else. ``loss`` and ``sum`` are two moments of
training: when the loss is computed, and when the gradients of embedding and head are summed over ranks, after those of
the layers. ``host``: in host memory, always, and so not in the peak of the device."""
PER_ROW = ("key-value cache", "sampling logits")
"""Lines that grow with the responses that are sampled in parallel."""
LOGIT_BYTES = 32 * 2**20
"""Logits that the fused objective holds at a time."""
BUCKET_NUMBERS = 16 * 2**20
"""Numbers of the gradient that ranks with whole copies sum at a time."""


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
        """Bytes of the device held at the worst moment."""
        return max(self.held("loading"), self.held("always") + max(self.training, self.held("rollout")))

    @property
    def training(self) -> int:
        """Bytes held at the worst moment of training, beside what is always held."""
        return self.held("training") + max(self.held("loss"), self.held("sum"))

    def held(self, phase: Phase) -> int:
        """Bytes of a phase."""
        return sum(line.bytes for line in self.lines if line.phase == phase)


@dataclass(frozen=True, slots=True)
class Held:
    """How one rank holds weights, gradients and moments.

    Args:
        layout: how the ranks share them.
        parts: over how many ranks a copy is cut.
        compute_bytes: of a number in forward and backward: 8, 4 or 2.
        width: bytes of a master weight: 8 or 4.
        reshard, sum_every_pass, offload: as in the recipe's table ``[sharding]``.
        adapters: numbers in LoRA adapters, which alone have gradients and moments; 0: the weights are trained.
        quantized: numbers of the matrices under adapters that are kept in 4 bits.
        largest_quantized: numbers of the largest of these matrices.
        frozen_head: the output layer is not trained.
        context: ranks that share rows.
    """

    layout: Layout = "none"
    parts: int = 1
    compute_bytes: int = 4
    width: int = 4
    reshard: bool = True
    sum_every_pass: bool = True
    offload: bool = False
    adapters: int = 0
    quantized: int = 0
    largest_quantized: int = 0
    frozen_head: bool = False
    context: int = 1

    @property
    def cut(self) -> bool:
        """Whether a rank holds a part of every weight."""
        return is_cut(self.layout)


def state_memory(counts: Counts, held: Held = Held()) -> tuple[Line, ...]:
    """Master weights, gradients and AdamW moments, and what a pass makes of the weights.

    A whole copy (`none`, `ddp`) is rounded once more for a pass in bfloat16. A cut one (`fsdp2`, `hsdp`) is gathered
    for it: embedding, norm and head while the pass lasts, and two layers, one in use and one on its way; their
    gradients are whole until they are summed, in the compute type and once more in float32.
    """
    n, width, share = counts.total + held.adapters - held.quantized, held.width, held.parts if held.cut else 1
    trained = held.adapters or n
    by = f" / {share} ranks" if held.cut else ""
    name = {4: "float32", 8: "float64"}[width]
    always: Phase = "host" if held.cut and held.offload else "always"
    at_the_end = held.cut and not held.sum_every_pass  # shards of gradients come to be as the whole ones are summed
    training: Phase = "host" if always == "host" else "sum" if at_the_end else "training"
    lines = [
        Line("weights", -(-n * width // share), f"{n:,} parameters x {width} B ({name}){by}", always),
        Line("AdamW moments", -(-trained * 2 * width // share), f"{trained:,} parameters x 2 x {width} B{by}", always),
        Line("gradients", -(-trained * width // share), f"{trained:,} parameters x {width} B{by}", training),
    ]
    if held.cut:
        return (*lines, *_gathered(counts, held))
    if held.compute_bytes < width:
        size = held.compute_bytes
        lines.append(Line("weights, rounded", n * size, f"{n:,} parameters x {size} B", "always"))
    return (*lines, *_in_four_bits(held))


def _in_four_bits(held: Held) -> tuple[Line, ...]:
    """Matrices in NF4: half a byte a number, and a float32 number for every 64. One at a time is whole in a pass."""
    n, one, size = held.quantized, held.largest_quantized, held.compute_bytes
    if not n:
        return ()
    rounded = size if size < 4 else 0
    whole = f"{one:,} parameters x {'(4 + ' + str(rounded) + ')' if rounded else 4} B"
    return (
        Line("weights in 4 bits", -(-n * 9 // 16), f"{n:,} parameters x (1 / 2 + 4 / 64) B (NF4)", "always"),
        Line("one matrix, whole", one * (4 + rounded), whole, "training"),
    )


def loading_memory(counts: Counts, held: Held, on_host: bool) -> tuple[Line, ...]:
    """The whole weights in host memory, from which those in 4 bits are made.

    Args:
        on_host: training itself is in host memory.
    """
    text = f"{counts.total:,} parameters x {held.width} B (while the model is opened)"
    size, phase = counts.total * held.width, "loading" if on_host else "host"
    return (Line("weights before they are quantized", size, text, phase),) if held.quantized else ()


def _gathered(counts: Counts, held: Held) -> tuple[Line, ...]:
    root, layer = counts.embedding + counts.head, counts.per_layer
    size, wide = held.compute_bytes, max(held.width, 4)
    unit = root + 2 * layer if held.reshard else counts.total
    said = f"(embedding and head {root:,} + 2 layers x {layer:,})" if held.reshard else f"{counts.total:,} parameters"
    weights = Line("gathered weights", unit * size, f"{said} x {size} B", "training")
    if held.adapters:
        text = f"{held.adapters:,} x {wide} B"
        return (weights, Line("gradients before the sum", held.adapters * wide, text, "training"))
    both = f"({size} + {wide}) B (before and after rounding)"
    last = Line("gradients of embedding and head", root * (size + wide), f"{root:,} x {both}", "sum")
    if held.sum_every_pass:
        name = "gradients of a layer"
        return (weights, Line(name, layer * (size + wide), f"{layer:,} x {both}", "training"), last)
    return (
        weights,
        Line("gradients before the sum", counts.total * wide, f"{counts.total:,} x {wide} B", "training"),
        last,
    )


@dataclass(frozen=True, slots=True)
class Reference:
    """A frozen policy that a stage compares with.

    Args:
        passes: how often it reads every row of a step.
        whole: whether its whole distributions are compared, or a teacher's, not the taken tokens' probabilities alone.
    """

    passes: int = 1
    whole: bool = False


NO_REFERENCE = Reference(0)


def reference_memory(counts: Counts, held: Held) -> Line:
    """A frozen copy of the policy to compare with, laid out as the policy."""
    share = held.parts if held.cut else 1
    by = f" / {share} ranks" if held.cut else ""
    text = f"{counts.total:,} parameters x {held.width} B{by}"
    away = held.cut and held.offload
    return Line("reference", -(-counts.total * held.width // share), text, "host" if away else "always")


def teacher_memory(counts: Counts, held: Held) -> Line:
    """The teacher's weights, which are not the policy's any more, laid out as the policy."""
    return replace(reference_memory(counts, held), name="teacher")


def checkpoint_memory(counts: Counts, held: Held, on_host: bool, copies: int = 3) -> Line:
    """The copy of weights and moments that a checkpoint is written from while training goes on, in host memory.

    Args:
        on_host: training itself is in host memory, where the copy then stands beside it.
        copies: numbers a parameter: its weight and two moments, and a moving average of it where there is one.
    """
    share = held.parts if held.cut else 1
    trained = held.adapters or counts.total
    by = f" / {share} ranks" if held.cut else ""
    what = "weights and moments" if copies == 3 else "weights, moments and their moving average"
    text = f"{trained:,} parameters x {copies} x {held.width} B ({what}){by}"
    return Line(
        "checkpoint being written", -(-trained * copies * held.width // share), text, "always" if on_host else "host"
    )


def whole_copy(counts: Counts, held: Held) -> tuple[Line, ...]:
    """The whole weights of a policy that is cut or has adapters, which the native sampler reads while it samples."""
    if held.adapters and not held.cut:
        text = f"{counts.matmul:,} parameters x {held.width} B (matrices with adapters merged)"
        return (Line("whole copy to sample", counts.matmul * held.width, text, "rollout"),)
    if not held.cut:
        return ()
    text = f"{counts.total:,} parameters x {held.width} B (a cut policy is put together to sample)"
    return (Line("whole copy to sample", counts.total * held.width, text, "rollout"),)


def activation_memory(
    counts: Counts, tokens: int, compute_bytes: int = 4, checkpointing: bool | int = False, context: int = 1
) -> Line:
    """What the backward pass needs of one micro-batch.

    A layer saves, a token: 4 H float32 numbers for its two norms and, in the compute type, the inputs of its linear
    maps (2 H, or 5 H under autocast, which rounds once for each of q, k, v, gate and up), queries and attention output
    (2 q), keys and values (2 kv) and 4 I in the gated MLP. With checkpointing a layer keeps its input (H float32
    numbers), and one at a time is whole; the last layer, if it is recomputed, beside all that are kept. Ranks that
    share rows keep the attention output before and after it is swapped (q more), and keys and values once for each of
    them where there are fewer.

    Args:
        tokens: tokens of a micro-batch on this rank, padding included.
        checkpointing: True: every layer is recomputed; k: the first and every k-th from there.
        context: ranks that share rows.
    """
    hidden, inputs = counts.hidden, 5 if compute_bytes == 2 else 2
    heads = 2 * counts.heads + 2 * max(counts.kv_heads, context if context > 1 else 0)
    heads += counts.heads if context > 1 else 0
    wide = inputs * hidden + counts.head_dim * heads + 4 * counts.intermediate
    layer = 16 * hidden + compute_bytes * wide
    text = f"{tokens:,} tokens x {counts.layers} layers x {layer:,} B"
    size = tokens * counts.layers * layer
    if again := recomputed_layers(counts.layers, checkpointing):
        whole = counts.layers - again + ((counts.layers - 1) % int(checkpointing) == 0)
        size = tokens * (again * 4 * hidden + whole * layer)
        text = f"{tokens:,} tokens x ({again} layer inputs x {4 * hidden:,} B + {whole} x {layer:,} B)"
    return Line("activations", size, text, "loss")


def logit_memory(counts: Counts, tokens: int, frozen: bool = False, compared: bool = False) -> tuple[Line, ...]:
    """The fused objective: one chunk of float32 logits at a time, and the output head's gradient beside the sum.

    Args:
        frozen: the output head is not trained, and has no gradient.
        compared: whole distributions are held against those of a reference model or a teacher.
    """
    held, what = 3, "logits, probabilities, their gradient"
    if compared:
        held, what = 6, f"{what}; of the other model too, and their difference"
    rows = min(tokens, max(1, LOGIT_BYTES // (4 * counts.vocab)))
    chunk = f"{rows:,} tokens x {counts.vocab:,} words x {held} x 4 B ({what})"
    head = f"{counts.vocab:,} x {counts.hidden:,} x 2 x 4 B (before and after scaling)"
    logits = Line("logits, one chunk", rows * counts.vocab * 4 * held, chunk, "loss")
    gradient = Line("output head's gradient", counts.vocab * counts.hidden * 8, head, "loss")
    return (logits,) if frozen else (logits, gradient)


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


def ahead_memory(counts: Counts, ahead: int, sampler: tuple[Line, ...]) -> tuple[Line, ...]:
    """A process that samples while this one trains: its model and its sampler, always, and weights handed over.

    Args:
        ahead: rollout batches that are sampled before they are trained.
        sampler: as :func:`rollout_memory`.
    """
    weights, text = counts.total * 4, f"{counts.total:,} parameters x 4 B"
    return (
        Line("weights of the process that samples", weights, text, "always"),
        *(replace(line, phase="always") for line in sampler),
        Line("weights handed over", ahead * weights, f"{ahead} x {text} (/dev/shm or disk)", "host"),
    )


def vllm_memory(counts: Counts, size: int, cache_gb: float) -> tuple[Line, ...]:
    """What vLLM's process holds of the same device as far as it is known, all the time: weights and cache."""
    weights = f"{counts.total:,} parameters x {size} B"
    return (
        Line("vLLM's weights", counts.total * size, weights, "always"),
        Line("vLLM's key-value cache", int(cache_gb * 1e9), f"kv_cache_gb = {cache_gb:g}", "always"),
    )


def sum_memory(counts: Counts, held: Held, ranks: int) -> tuple[Line, ...]:
    """The buffer in which ranks with whole copies sum gradients: some at a time, or the largest tensor by itself."""
    if held.cut or ranks == 1:
        return ()
    trained = held.adapters or counts.total
    largest = 0 if held.adapters else counts.embedding
    numbers = max(min(trained, BUCKET_NUMBERS), largest)
    text = f"{numbers:,} x {held.width} B (gradients that are summed over ranks at a time)"
    return (Line("communication buffer", numbers * held.width, text, "sum"),)


def readable(size: float) -> str:
    """Bytes in GiB or MiB, for people."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"

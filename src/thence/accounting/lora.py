"""Parameters of LoRA adapters, counted from a model's shape."""

from __future__ import annotations

from collections.abc import Sequence

from thence.accounting.flops import Counts
from thence.recipe import Lora


def adapter_parameters(counts: Counts, settings: Lora) -> int:
    """Numbers in the two matrices of every adapter: rank x (inputs + outputs) each, in all layers.

    A target is known by the last part of its name, as ``q_proj``; one with the number of a layer counts as in all.
    Modules that are trained whole are in it: the embedding and the output layer with all their rows.
    """
    adapters = counts.layers * settings.rank * sum(map(sum, _adapted(counts, settings)))
    saved = {name.rpartition(".")[2] for name in settings.modules_to_save}
    return adapters + counts.vocab * counts.hidden * len(saved & {"embed_tokens", "lm_head"})


def quantized_parameters(counts: Counts, settings: Lora) -> tuple[int, int]:
    """Numbers of the matrices under the adapters that are kept in 4 bits, in all layers; and of the largest matrix."""
    sizes = [inputs * outputs for inputs, outputs in _adapted(counts, settings)] if settings.quantize else []
    return counts.layers * sum(sizes), max(sizes, default=0)


def _adapted(counts: Counts, settings: Lora) -> list[tuple[int, int]]:
    """The inputs and outputs of the matrices of one layer that get an adapter."""
    widths = _linear_layers(counts)
    targets: Sequence[str] = list(widths) if settings.targets == "all-linear" else settings.targets
    named = {target.rpartition(".")[2] for target in targets} & widths.keys()
    return [widths[name] for name in named]


def _linear_layers(counts: Counts) -> dict[str, tuple[int, int]]:
    """The inputs and outputs of every linear layer in one layer of the families that are counted."""
    hidden, wide = counts.hidden, counts.intermediate
    q, kv = counts.heads * counts.head_dim, counts.kv_heads * counts.head_dim
    return {
        "q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden),
        "gate_proj": (hidden, wide), "up_proj": (hidden, wide), "down_proj": (wide, hidden),
    }  # fmt: skip

"""FLOPs of a decoder-only transformer, by the paper's rule and counted exactly.

A multiplication and an addition are two FLOPs. Only matrix products are counted; norms, activations, softmax and the
optimizer are left out, as is usual (they are below one per cent for models of more than a few million parameters).
Sizes may be means, so token counts are floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from thence.errors import UserError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class Counts:
    """Parameters of a model by part, and the sizes that FLOPs and memory follow from."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    embedding: int
    """Rows of the embedding; the output head too when they are tied."""
    attention: int
    """Matrices of queries, keys, values and output, all layers."""
    mlp: int
    """Gate, up and down matrices, all layers."""
    vectors: int
    """Biases and norm weights."""
    head: int
    """Output head; 0 when tied to the embedding."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.attention + self.mlp + self.vectors + self.head

    @property
    def matmul(self) -> int:
        """Parameters that every token is multiplied with: the layers' matrices, without embedding and head."""
        return self.attention + self.mlp

    @property
    def per_layer(self) -> int:
        """Parameters of one layer's matrices."""
        return self.matmul // self.layers


def parameters(config: Mapping[str, Any]) -> Counts:
    """Count a model's parameters from its configuration, without building it.

    Args:
        config: the contents of a Hugging Face ``config.json`` of the families in :data:`FAMILIES`.

    Raises:
        UserError: another family, or a field is missing.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"cannot count the parameters of model_type {family!r}",
            remedy=f"the families known here are {', '.join(FAMILIES)}",
            field="model_type",
        )
    hidden, layers, heads = (_size(config, key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    intermediate, vocab = _size(config, "intermediate_size"), _size(config, "vocab_size")
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, kv_heads * head_dim
    attention_bias = bool(config.get("attention_bias", False))
    biases = q + 2 * kv if family == "qwen2" or attention_bias else 0
    if attention_bias and family != "qwen2":
        biases += hidden
    if config.get("mlp_bias", False):
        biases += 2 * intermediate + hidden
    norms = 2 * hidden + (2 * head_dim if family == "qwen3" else 0)
    return Counts(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        vocab=vocab,
        embedding=vocab * hidden,
        attention=layers * 2 * hidden * (q + kv),
        mlp=layers * 3 * hidden * intermediate,
        vectors=layers * (biases + norms) + hidden,
        head=0 if config.get("tie_word_embeddings", False) else vocab * hidden,
    )


def rule_flops(n_parameters: float, trained: float, generated: float = 0, scored: float = 0) -> float:
    """The paper's rule (arXiv 2604.23747, appendix B): ``6 N trained + 2 N generated``; and 2 N for each token scored.

    A forward pass costs 2N a token and a backward pass 4N, so a demonstration's token costs 6N, and a token that was
    generated and then trained costs 8N: count it in both arguments.

    Args:
        n_parameters: N. The paper takes the nominal 7e9; budgets here take every parameter of the model.
        trained: tokens that go forward and backward.
        generated: tokens that are sampled.
        scored: tokens that a reference model or a teacher reads beside the policy, which the paper's methods do not
            have; once for every time.
    """
    return n_parameters * (6 * trained + 2 * generated + 2 * scored)


def causal_pairs(length: float, prefix: float = 0) -> float:
    """Pairs (query, key) of ``length`` tokens that attend to ``prefix`` cached ones, to earlier ones and themselves."""
    return length * prefix + length * (length + 1) / 2


def forward_flops(counts: Counts, tokens: float, pairs: float, logits: float) -> float:
    """One forward pass: ``2 M tokens + 4 L h d pairs + 2 H V logits``.

    M are the matrix parameters of the layers, L the layers, h d the width of all query heads (scores and the weighted
    sum of values cost 2 h d a pair each), H the hidden size, V the vocabulary.

    Args:
        tokens: tokens run through the layers.
        pairs: attended pairs, :func:`causal_pairs` summed over sequences. Only the causal half is counted.
        logits: positions at which the output head is computed.
    """
    attention = 4 * counts.layers * counts.heads * counts.head_dim * pairs
    return 2 * counts.matmul * tokens + attention + 2 * counts.hidden * counts.vocab * logits


def recomputed_layers(layers: int, checkpointing: bool | int) -> int:
    """Of so many layers, how many run again in the backward pass: all, none, or the first and every k-th from there."""
    return -(-layers // int(checkpointing)) if checkpointing else 0


def training_flops(
    counts: Counts, tokens: float, pairs: float, logits: float, checkpointing: bool | int = False, adapters: int = 0
) -> float:
    """Forward and backward: three times :func:`forward_flops`; with checkpointing layers run once more.

    A layer runs again up to the last number that its backward pass needs, which is what the down matrix is multiplied
    with. That product itself is not repeated, unless adapters beside the matrix need their own inputs after it.

    Args:
        checkpointing: True: every layer does; k: every k-th.
        adapters: numbers in LoRA adapters. They cost ``6 adapters tokens`` more, and the matrices under them, being
            frozen, no product for their own gradient: that third of their cost is left out. 0: the weights are trained.
    """
    own = 2 * adapters * tokens
    share = recomputed_layers(counts.layers, checkpointing) / counts.layers
    down = 0 if adapters else 2 * counts.mlp / 3 * tokens
    again = share * (forward_flops(counts, tokens, pairs, 0) + own - down)
    frozen = 2 * counts.matmul * tokens + 2 * counts.hidden * counts.vocab * logits if adapters else 0
    return 3 * (forward_flops(counts, tokens, pairs, logits) + own) - frozen + again


def sampling_flops(counts: Counts, prompt: float, response: float) -> float:
    """One response sampled with a key-value cache: the last sampled token is never fed back."""
    if response <= 0:
        return 0.0
    fed = prompt + response - 1
    return forward_flops(counts, fed, causal_pairs(fed), response)


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(
            f"the model's configuration has no usable {key} (got {value!r})",
            remedy="give a positive whole number",
            field=key,
        )
    return value

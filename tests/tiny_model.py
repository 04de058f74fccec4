"""A random model small enough for a float64 oracle."""

from __future__ import annotations

from typing import Any

import torch

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, POSITIONS = 40, 32, 2, 4, 2, 512


def make_tiny_model(dtype: torch.dtype = torch.float64, kind: str = "llama", seed: int = 0) -> Any:
    """A random causal language model in eval mode; its weights are large enough that probabilities differ much.

    One seed gives the same weights in every dtype (they are drawn in float32).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "initializer_range": 0.2,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if kind == "gpt2":
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        sizes |= {"num_key_value_heads": KV_HEADS, "intermediate_size": 2 * HIDDEN, "head_dim": HIDDEN // HEADS}
    config = AutoConfig.for_model(kind, **sizes)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).eval()
    torch.set_rng_state(state)
    return model

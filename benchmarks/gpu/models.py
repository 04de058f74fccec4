"""Random models: tiny ones of several families, one of middle size, one of real size. Nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch

VOCAB, WINDOW = 320, 8
TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    "gpt2": {},
    "gemma3_text": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}
MIDDLE: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1536,
    "initializer_range": 0.05,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
# the architecture of Qwen/Qwen2.5-1.5B, as its config.json gives it
REAL: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}

# what differs in that of Qwen/Qwen2.5-0.5B
HALF = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_hidden_layers": 24}


def tiny(kind: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
    """A model of a family with two layers; the same weights in every dtype and on every device."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.15,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    if kind == "gpt2":
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        sizes |= {"num_key_value_heads": 2, "intermediate_size": 128, "head_dim": 16}
    return build(kind, {**sizes, **TINY[kind]}, dtype, device)


def build(kind: str, sizes: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> Any:
    """A random model in evaluation mode; drawn in float32 on the CPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, bos_token_id=0, eos_token_id=1, pad_token_id=None, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # transformers' grouped products are not written for float64
    return model.to(dtype).to(device).eval()


def real(device: torch.device, small: bool, half: bool = False) -> Any:
    """The model of 1.5 billion parameters, or of half a billion, drawn on the device itself: a CPU is slow at it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {**REAL, "num_hidden_layers": 2, "hidden_size": 192, "intermediate_size": 512} if small else REAL
    sizes = {**sizes, **HALF} if half and not small else sizes
    sizes = {**sizes, "vocab_size": 2048} if small else sizes
    torch.manual_seed(0)
    with torch.device(device):
        config = AutoConfig.for_model("qwen2", bos_token_id=0, eos_token_id=1, **sizes)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

"""Tiny random models of every causal-language-model architecture of the installed transformers.

A configuration is made small by the names of its fields; what the names do not say stands in ``EXCEPTIONS``, and an
architecture that cannot be made stands in ``NOT_MADE`` with the reason. Weights are random and large enough that a
wrong mask, a lost bias or a lost attention sink moves the log-probabilities far beyond rounding.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from thence.data.worlds.vocabulary import VOCABULARY

VOCAB = len(VOCABULARY)  # that of the embedded world's tokenizer
HIDDEN, HEADS, KV_HEADS, HEAD, LAYERS, WINDOW, POSITIONS = 32, 4, 2, 8, 2, 8, 128
SPREAD = 0.2  # standard deviation of matrices, biases, and of norms around one

_HIDDEN_FIELDS = ("hidden_size", "d_model", "n_embd", "emb_dim", "dim", "embedding_size", "word_embed_proj_dim")
_LAYER_FIELDS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers", "num_decoder_layers",
)  # fmt: skip
_HEAD_FIELDS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads",
    "num_decoder_attention_heads", "swa_num_attention_heads", "linear_num_heads",
)  # fmt: skip
_KV_FIELDS = ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups")
_INNER_FIELDS = (
    "intermediate_size", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "moe_intermediate_size", "n_inner", "dff",
    "shared_expert_intermediate_size", "shared_experts_intermediate_size", "shared_intermediate_size",
    "intermediate_size_mlp", "expert_ffn_hidden_size", "dense_intermediate_size", "d_inner", "dim_ff",
    "moe_shared_expert_intermediate_size", "feed_forward_size", "prefix_dense_intermediate_size",
)  # fmt: skip
_EXPERT_FIELDS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_CHOSEN_FIELDS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
_POSITION_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length")
_WINDOW_FIELDS = (
    "sliding_window", "sliding_window_size", "attention_chunk_size", "window_size", "attention_window_size",
    "local_attention", "keep_window_size",
)  # fmt: skip
_FIXED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "head_dim": HEAD,
    "global_head_dim": HEAD,
    "swa_head_dim": HEAD,
    "d_kv": HEAD,
    "d_head": HEAD,
    "dim_head": HEAD,
    "kv_channels": HEAD,
    "attention_head_size": HEAD,
    "linear_head_dim": HEAD,
    # multi-head latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "o_lora_rank": 8,
    "o_groups": 2,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
    # mixtures of experts
    "n_group": 2,
    "topk_group": 1,
    "num_expert_group": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_nextn_predict_layers": 0,
    # state-space and linear attention
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
    "mamba_dt_rank": 4,
    "state_size": 8,
    "ssm_state_size": 8,
    "time_step_rank": 4,
    "chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    # rotary embeddings over a part of a head
    "rotary_dim": 4,
    # positions by buckets
    "rel_extent": 16,
    "d_rel": 8,
}
_OFF = {"aux_loss", "layerdrop", "jitter"}

# Fields that the rules above do not get right, by model type.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4},
    "dots3_note_text": {
        "num_key_value_heads": HEADS, "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8, "head_dim": 16,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "laurel_rank": 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "global_head_dim": 16,
    },
    "git": {
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 8,
        }
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2},
    "qwen4_exp_text": {
        "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {
        "attn_layers": ["local", "local"], "axial_pos_shape": (8, 16), "axial_pos_embds_dim": (16, 16),
        "local_attn_chunk_length": 8,
    },
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "roc_bert": {
        "pronunciation_vocab_size": 8, "shape_vocab_size": 8, "pronunciation_embed_dim": 8, "shape_embed_dim": 8,
    },
    "xlm": {"causal": True},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 16,
        "attention_hidden_size": 64, "num_key_value_heads": HEADS,
    },
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"], "router_hidden_size": 16},
}  # fmt: skip

# Tensors that transformers sets to a constant of the architecture whenever it opens a model.
KEPT = ("balancing_biases",)

# Why an architecture has no tiny model here.
NOT_MADE: dict[str, str] = {
    "gemma4_assistant": "drafts tokens from the cache of another model; it does not run alone",
    "gemma4_unified_assistant": "drafts tokens from the cache of another model; it does not run alone",
    "blt": "reads bytes through a model that cuts them into patches; no vocabulary of tokens",
    "emu3": "AutoModelForCausalLM does not map the configuration of its text model alone",
    "mllama": "AutoModelForCausalLM does not map the configuration of its text model alone",
    "phi4_multimodal": "its vision and audio towers cannot be left out",
    "musicgen": "a decoder of audio tokens in several codebooks; it does not read text",
    "musicgen_melody": "a decoder of audio tokens in several codebooks; it does not read text",
}

# The same architectures with other settings.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2, windows": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None}),
    "qwen3, windows": ("qwen3", {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None}),
    "phi3, no window": ("phi3", {"sliding_window": None}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True}),
    "bert, reads both ways": ("bert", {"is_decoder": False}),
    "roberta, reads both ways": ("roberta", {"is_decoder": False}),
    "xlm, reads both ways": ("xlm", {"causal": False}),
    "gpt_oss, one full layer": ("gpt_oss", {"layer_types": ["full_attention", "full_attention"]}),
    "llama, yarn": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
                             "rope_theta": 10000.0}},
    ),
    "llama, dynamic rope": (
        "llama",
        {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0,
                                                              "rope_theta": 10000.0}},
    ),
    "phi3, longrope": (
        "phi3",
        {"original_max_position_embeddings": 16, "sliding_window": None,
         "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
                             "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}},
    ),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gptj, untied": ("gptj", {"tie_word_embeddings": False}),
    "mixtral, no window": ("mixtral", {"sliding_window": None}),
    "gemma2, no softcap": ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": None}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
}  # fmt: skip

# The families that the tests run: one or more for every way that a model can differ.
SAMPLE = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "gptj", "stablelm",
    "bloom", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "cohere2", "olmo3", "mamba", "lfm2", "qwen3_next",
    "granitemoehybrid",
)  # fmt: skip


def architectures() -> dict[str, str]:
    """Model type and class of every causal language model of the installed transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(kind: str) -> Any:
    """A small configuration of the architecture or variant; that of its text model where it nests one."""
    from transformers import CONFIG_MAPPING

    kind, own = VARIANTS.get(kind, (kind, {}))
    made = CONFIG_MAPPING[kind]
    text = made.sub_configs.get("text_config")
    if text is not None and text is not made:
        from transformers import AutoConfig

        whole = made()
        made = type(whole.get_text_config(decoder=True)) if text is AutoConfig else text
    fields = {field.name for field in dataclasses.fields(made)}
    try:
        usual = made()
    except Exception:  # its own defaults are not valid: nothing to read from them
        usual = None
    sizes = _sizes(fields, usual)
    for exceptions in (EXCEPTIONS.get(made.model_type, {}), EXCEPTIONS.get(kind, {})):
        sizes |= exceptions
    sizes |= own
    return made(**sizes)


def tiny_model(kind: str, seed: int = 0) -> Any:
    """A random float32 model in eval mode. The same seed gives the same weights."""
    from transformers import AutoModelForCausalLM

    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32).eval()
    _randomise(model, seed)
    torch.set_rng_state(state)
    return model


def _sizes(fields: set[str], usual: Any) -> dict[str, Any]:
    groups = (
        (_HIDDEN_FIELDS, HIDDEN),
        (_HEAD_FIELDS, HEADS),
        (_KV_FIELDS, KV_HEADS),
        (_INNER_FIELDS, 48),
        (_EXPERT_FIELDS, 4),
        (_CHOSEN_FIELDS, 2),
        (_POSITION_FIELDS, POSITIONS),
        (_WINDOW_FIELDS, WINDOW),
    )
    sizes = {name: value for names, value in groups for name in names} | _FIXED
    sizes = {name: value for name, value in sizes.items() if name in fields}
    for name in _WINDOW_FIELDS:  # a model whose windows are off by default keeps them off
        off = usual is not None and getattr(usual, name, None) in (None, 0, -1)
        if name in sizes and off and name != "sliding_window":
            del sizes[name]
    kinds = {name: pattern for name, pattern in _kinds(usual).items() if name in fields}
    layers = max([LAYERS, *(len(pattern) for pattern in kinds.values())])
    sizes |= {name: layers for name in _LAYER_FIELDS if name in fields}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        sizes["num_key_value_heads"] = HEADS
    if "is_decoder" in fields:  # BERT and its kin: a causal decoder only where the configuration says so
        sizes["is_decoder"] = True
    for name, pattern in kinds.items():
        sizes[name] = [pattern[min(i, len(pattern) - 1)] for i in range(layers)]
    for name in fields:
        noisy = "dropout" in name or name.endswith("pdrop") or any(part in name for part in _OFF)
        if noisy and isinstance(getattr(usual, name, None), float):
            sizes[name] = 0.0
    return sizes


def _kinds(usual: Any) -> dict[str, list[str]]:
    """The kinds of layer in every list of kinds that a configuration has, in the order of their first use."""
    found = {}
    for name in ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "indexer_types"):
        pattern = getattr(usual, name, None)
        if isinstance(pattern, list | tuple) and pattern:
            found[name] = list(dict.fromkeys(pattern))
    return found


def _randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    named = [*model.named_parameters(), *model.named_buffers()]
    kept = model.state_dict().keys()
    with torch.no_grad():
        for name, tensor in named:
            if name not in kept or not tensor.is_floating_point() or tensor.data_ptr() in done:
                continue
            done.add(tensor.data_ptr())
            is_buffer = not isinstance(tensor, torch.nn.Parameter)
            if (is_buffer and "bias" not in name) or name.endswith(KEPT):
                continue
            _redraw(tensor, generator)


def _redraw(tensor: Tensor, generator: torch.Generator) -> None:
    """Constants (norms, biases, sinks) get noise; weights that were drawn too small are made larger."""
    noise = torch.randn(tensor.shape, generator=generator) * SPREAD
    spread = float(tensor.std()) if tensor.numel() > 1 else 0.0
    if spread == 0.0:
        tensor.add_(noise)
    elif tensor.ndim >= 2 and spread < SPREAD:
        tensor.mul_(SPREAD / spread)
    else:
        tensor.add_(noise * 0.5)


def not_made(kind: str) -> str:
    """Why this architecture has no tiny model; empty where it has one."""
    return NOT_MADE.get(kind, "")


def variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """Settings of an architecture that take another way through a model: a name, the model type, and its fields."""
    return VARIANTS


def class_of(kind: str) -> str:
    """The class of an architecture or a variant."""
    return architectures()[VARIANTS[kind][0] if kind in VARIANTS else kind]

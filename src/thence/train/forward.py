"""From a micro-batch to the hidden states that predict its trained tokens, for any Hugging Face causal language model.

The loss is never computed inside the model: that is where models and their versions differ.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from thence.errors import UserError
from thence.kernels.attention import packed_causal_attention
from thence.train.micro_batches import MicroBatch

PACKED_ATTENTION = "thence_packed"


def hidden_states(model: Any, micro: MicroBatch) -> Tensor:
    """Last hidden states at the positions that predict the trained tokens, shape (T, D)."""
    decoder = model.base_model
    if micro.packed:
        if model.config._attn_implementation != PACKED_ATTENTION:
            use_packed_attention(model)
        positions = torch.cat([torch.arange(n, device=micro.token_ids.device) for n in micro.lengths])[None]
        # transformers takes a mask of four dimensions as finished; ours is not looked at (see packed_attention)
        no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=micro.token_ids.device)
        output = decoder(
            input_ids=micro.token_ids,
            position_ids=positions,
            attention_mask=no_mask,
            use_cache=False,
            packed_lengths=micro.lengths,
        )
    else:
        output = decoder(input_ids=micro.token_ids, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)[micro.predicts_T]


def output_head(model: Any) -> tuple[Tensor, float]:
    """The output embedding, shape (V, D), and the constant that its logits are multiplied by."""
    config = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return model.get_output_embeddings().weight, scale


def compute_context(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Where the forward pass runs: in bfloat16 through autocast, else in the dtype of the weights."""
    return torch.autocast(device.type, dtype) if dtype in (torch.bfloat16, torch.float16) else nullcontext()


def check_model(model: Any) -> None:
    """Make sure that hidden states times output embedding are the model's own logits, on a few tokens.

    Raises:
        UserError: the model does something else with its logits (a bias, soft-capping, ...).
    """
    device = next(model.parameters()).device
    token_ids = torch.arange(6, device=device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        expected = model(input_ids=token_ids, use_cache=False).logits.float()
        hidden = model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state
        head, scale = output_head(model)
        logits = (hidden @ head.T).float() * scale
    if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise UserError(
            f"the logits of {type(model).__name__} are not its last hidden states times its output embedding",
            remedy="models with a bias or soft-capping on their logits are not supported",
        )


def use_packed_attention(model: Any) -> None:
    """Make the model attend within packed rows only, where rows are packed; it attends as before where they are not.

    Raises:
        UserError: the model's attention cannot be replaced.
    """
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
    try:
        model.set_attn_implementation(PACKED_ATTENTION)
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{type(model).__name__} does not allow packing: {error}", remedy="set packing = false", field="packing"
        ) from None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_lengths: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each packed row over itself alone; without ``packed_lengths``, transformers' own attention.

    Args:
        query: (1, heads, T, head size); key and value may have fewer heads.
        packed_lengths: tokens of each row, end to end along T.

    Returns:
        (1, T, heads, head size), and no attention weights.
    """
    if packed_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return packed_causal_attention(q, k, v, packed_lengths, scale)[None], None

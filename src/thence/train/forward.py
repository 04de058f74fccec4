"""From a micro-batch to the hidden states that predict its trained tokens, for any Hugging Face causal language model.

The loss is never computed inside the model: that is where models and their versions differ.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from thence.models.layers import decoder_of
from thence.models.lengths import check_lengths
from thence.models.packing import attending, packed_hidden_states, way_of
from thence.train.micro_batches import MicroBatch


def hidden_states(model: Any, micro: MicroBatch) -> Tensor:
    """Last hidden states at the positions that predict the trained tokens, shape (T, D).

    Raises:
        UserError: the rows are packed or cut, and the model's cannot be; a row is longer than the model's context.
    """
    check_lengths(model, micro.lengths)
    decoder = decoder_of(model)
    if micro.packed:
        with attending(model, True):
            hidden = packed_hidden_states(decoder, micro.token_ids, micro.lengths, way_of(model), micro.piece)
    else:
        hidden = decoder(input_ids=micro.token_ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[micro.predicts_T]


def compute_context(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Where the forward pass runs: in bfloat16 through autocast, else in the dtype of the weights."""
    return torch.autocast(device.type, dtype) if dtype in (torch.bfloat16, torch.float16) else nullcontext()

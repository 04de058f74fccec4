"""Small models of several families, and steps on made rows."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from thence.data.trajectory import Prompt, Trajectory
from thence.methods.base import make_rows
from thence.objective import Batch, Logp, Normaliser, Term, local_counts
from thence.train.policy import Policy
from thence.train.step import StepSettings, accumulate_gradients

SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}


SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
CPU = torch.device("cpu")


def make(kind: str, dtype: torch.dtype = torch.float64, **fields) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **fields}), dtype=dtype).eval()
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    for name, parameter in model.named_parameters():
        if name.endswith(("sinks", "bias")):
            nn.init.normal_(parameter, std=0.5)
    return model


SFT = Term("sft", Logp(), Normaliser("tokens"))


def rows_of(lengths, vocabulary: int = 40):
    generator = torch.Generator().manual_seed(1)
    trajectories = [
        Trajectory(Prompt(i, tuple(ids[:3])), tuple(ids[3:]))
        for i, n in enumerate(lengths)
        for ids in [torch.randint(1, vocabulary, (n,), generator=generator).tolist()]
    ]
    return make_rows([SFT], trajectories, [{"sft": 1.0 + i} for i in range(len(trajectories))])


def step_of(model, rows, packing):
    batch = Batch((SFT,), tuple(rows))
    settings = StepSettings(100, packing, 0.0, next(model.parameters()).dtype)
    loss = accumulate_gradients(
        Policy(model), torch.optim.SGD(model.parameters()), batch, local_counts(batch), settings
    ).loss
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return loss.item(), found


def plain(model, rows):
    """Loss and gradient by the model's own logits, one row at a time."""
    model.zero_grad()
    total = 0.0
    trained = sum(row.n_trained for row in rows)
    for row in rows:
        logp = model(input_ids=row.token_ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        taken = logp.gather(1, row.token_ids[1:, None])[:, 0][row.trained[1:]]
        loss = -(taken * row.weights[0]).sum() / trained
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

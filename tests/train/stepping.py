"""Trainers of a model, and the same step by plain torch."""

from __future__ import annotations

from typing import Any

import torch

from tests.oracle import (
    VARIANTS,
    Case,
    Variant,
    contributions,
)
from thence.train.step import StepSettings
from thence.train.trainer import Trainer


def plain_adamw(model, decay: float) -> torch.optim.AdamW:
    """torch's own loop over tensors; matrices are decayed, vectors are not."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-7, foreach=False)


def oracle_step(model, optimizer: torch.optim.Optimizer, case: Case, variant: Variant) -> None:
    optimizer.zero_grad()
    contributions(model, case, variant)[0].sum().backward()
    optimizer.step()


CPU = torch.device("cpu")
SFT, MOVED, PAPER, DAPO = VARIANTS[0], VARIANTS[2], VARIANTS[3], VARIANTS[-1]
LENGTHS = [(3, 7), (3, 12), (2, 4), (4, 1), (5, 9), (1, 20)]


def trainer_of(model, rate: Any = 0.01, clip_norm=0.0, budget=60, **options) -> Trainer:
    return Trainer(model, rate, StepSettings(budget, False, clip_norm, next(model.parameters()).dtype), **options)


def parameters_of(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()

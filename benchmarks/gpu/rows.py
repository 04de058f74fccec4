"""Random rows, the engine's gradient on them, and the plain one that holds it to account."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from thence.data.trajectory import Prompt, Trajectory
from thence.methods.base import make_batch
from thence.methods.grpo import Grpo
from thence.methods.sft import SftMethod
from thence.objective import Batch, local_counts
from thence.train.policy import Policy
from thence.train.step import StepSettings, accumulate_gradients

LENGTHS = [(3, 7), (9, 31), (2, 4), (4, 1), (5, 45), (1, 20), (12, 33), (7, 2), (6, 18)]
GROUP = 3


def trajectories(lengths: Sequence[tuple[int, int]], vocabulary: int, seed: int = 0) -> list[Trajectory]:
    """Random prompts and responses of these lengths, in groups of three of which one is right."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i, (prompt, response) in enumerate(lengths):
        ids = torch.randint(vocabulary, (prompt + response,), generator=generator).tolist()
        score = float(i % GROUP == 0)
        found.append(Trajectory(Prompt(i // GROUP, tuple(ids[:prompt])), tuple(ids[prompt:]), score=score))
    return found


def sft_batch(rows: Sequence[Trajectory], silent: bool = False) -> Batch:
    """Plain maximum likelihood; ``silent``: every third row weighs nothing."""
    batch = make_batch(SftMethod(), rows)
    heard = [replace(r, weights=r.weights * float(not silent or i % 3 != 1)) for i, r in enumerate(batch.rows)]
    return replace(batch, rows=tuple(heard))


def grpo_batch(rows: Sequence[Trajectory], statistics: Sequence[Tensor]) -> Batch:
    """GRPO with a moved behaviour policy, a KL term and an entropy bonus; old log-probabilities from ``statistics``."""
    batch = make_batch(Grpo({"kl": 0.05, "entropy": 0.02}), rows, temperature=0.8)
    shifts = [torch.linspace(-0.6, 0.6, len(logp), dtype=torch.float64) for logp in statistics]
    made = [
        replace(row, behaviour=logp.double() + shift, reference=logp.double() - shift.flip(0) / 2)
        for row, logp, shift in zip(batch.rows, statistics, shifts, strict=True)
    ]
    return replace(batch, rows=tuple(made))


def engine(
    model: Any, batch: Batch, budget: int = 10**6, packing: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[float, Tensor]:
    """Loss and gradient as thence's step computes them; the gradient as one float64 vector on the CPU."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss = accumulate_gradients(
        Policy(model), optimizer, batch, local_counts(batch), StepSettings(budget, packing, 0.0, dtype)
    ).loss
    vector = torch.cat([p.grad.double().flatten().cpu() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return float(loss), vector


def plain(model: Any, rows: Sequence[Trajectory], silent: bool = False) -> tuple[float, Tensor]:
    """The same for :func:`sft_batch` from the model's own logits, row by row; nothing of thence's step is in it."""
    device = next(model.parameters()).device
    tokens = sum(len(row.response_ids) for row in rows)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for i, row in enumerate(rows):
        if silent and i % 3 == 1:
            continue
        start, ids = len(row.prompt.token_ids), torch.tensor([*row.prompt.token_ids, *row.response_ids], device=device)
        log_p = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        total = total - log_p[start - 1 : -1].gather(1, ids[start:, None]).sum() / tokens
    model.zero_grad(set_to_none=True)
    total.backward()
    vector = torch.cat([p.grad.double().flatten().cpu() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return total.item(), vector


def relative(got: Tensor, expected: Tensor) -> float:
    """Euclidean distance over the length of the second."""
    return ((got - expected).norm() / expected.norm()).item()


def cosine(got: Tensor, expected: Tensor) -> float:
    """Cosine of the angle between two gradients."""
    return (got @ expected / got.norm() / expected.norm()).item()

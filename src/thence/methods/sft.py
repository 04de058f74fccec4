"""Supervised fine-tuning: maximum likelihood of demonstrations, one mean over all response tokens of the step.

    L = - (1 / N) sum_i sum_t log pi(y_it | x_i, y_i<t),   N = response tokens of the whole step

N is counted over all micro-batches and ranks (arXiv 2604.23747, Algorithm 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thence.data.trajectory import Trajectory
from thence.methods.base import Method
from thence.objective import Logp, Normaliser, Term


class Sft(Method):
    """Token-mean maximum likelihood."""

    name = "sft"
    stage = "sft"
    formula = "-(1/N) sum log pi(y_t), N = response tokens of the step"
    source = "arXiv 2604.23747, Algorithm 2"
    terms = (Term("sft", Logp(), Normaliser("tokens")),)  # type: ignore[assignment]

    def weigh(self, trajectories: Sequence[Trajectory]) -> list[Tensor]:
        return [torch.ones(1, len(trajectory.response_ids), dtype=torch.float64) for trajectory in trajectories]

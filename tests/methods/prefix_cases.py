"""Trajectories with made facts, for the tests of methods with prefixes and replays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from thence.data.trajectory import Prompt, Trajectory
from thence.methods.base import TokenFacts


def trajectory(index: int, score: float, tokens: int = 4, **fields: Any) -> Trajectory:
    return Trajectory(Prompt(index, (2, 3)), tuple(range(4, 4 + tokens)), score=score, **fields)


def flat_facts(trajectories: Sequence[Trajectory]) -> list[TokenFacts]:
    """Entropies that rise along each response."""
    return [TokenFacts(-torch.ones(n), torch.arange(n).float()) for n in (len(t.response_ids) for t in trajectories)]

"""Trajectories as the groups that methods compare."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from thence.data.trajectory import Trajectory
from thence.methods.base import Sampler


def groups_of(trajectories: Sequence[Trajectory]) -> list[list[Trajectory]]:
    """Neighbouring trajectories of one draw of a prompt as lists."""
    return [list(group) for _, group in itertools.groupby(trajectories, key=lambda t: t.prompt.group_key)]


def sampled_groups(sampler: Sampler, prompts: int, n: int) -> list[list[Trajectory]]:
    """``n`` rollouts for each of this rank's share of the next ``prompts`` prompts, a list a prompt."""
    found = sampler.rollouts(sampler.next_prompts(prompts), n)
    return [found[i : i + n] for i in range(0, len(found), n)]


def group_numbers(trajectories: Sequence[Trajectory]) -> Tensor:
    """The group of each trajectory, shape (N,), integers: those of one draw of a prompt share it."""
    numbers: dict[tuple[int, int], int] = {}
    return torch.tensor([numbers.setdefault(t.prompt.group_key, len(numbers)) for t in trajectories], dtype=torch.int64)

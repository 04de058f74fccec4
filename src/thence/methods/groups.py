"""Trajectories as the groups that methods compare."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from thence.data.trajectory import Trajectory


def groups_of(trajectories: Sequence[Trajectory]) -> list[list[Trajectory]]:
    """Neighbouring trajectories of one draw of a prompt as lists."""
    return [list(group) for _, group in itertools.groupby(trajectories, key=lambda t: t.prompt.group_key)]


def group_numbers(trajectories: Sequence[Trajectory]) -> Tensor:
    """The group of each trajectory, shape (N,), integers: those of one draw of a prompt share it."""
    numbers: dict[tuple[int, int], int] = {}
    return torch.tensor([numbers.setdefault(t.prompt.group_key, len(numbers)) for t in trajectories], dtype=torch.int64)

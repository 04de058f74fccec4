"""Trajectories as the groups that methods compare."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from thence.data.trajectory import Trajectory


def groups_of(trajectories: Sequence[Trajectory]) -> list[list[Trajectory]]:
    """Neighbouring trajectories of one draw of a prompt as lists."""
    return [list(group) for _, group in itertools.groupby(trajectories, key=lambda t: t.prompt.group_key)]

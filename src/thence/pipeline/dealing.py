"""How a rollout batch is dealt to ranks: 1, 2 or 4 of them train the same steps, and resume each other's run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from thence.data.trajectory import Trajectory
from thence.errors import UserError
from thence.methods.base import Method
from thence.methods.groups import groups_of
from thence.pipeline.context import StageContext
from thence.pipeline.sampler import RolloutSampler
from thence.train.parallel import Ranks


def mini_batches(trajectories: Sequence[Trajectory], minis: int, ranks: Ranks | None = None) -> list[list[int]]:
    """Indices of this rank's trajectories of each optimizer step.

    The groups of all ranks are dealt evenly, whole and in the order of their draws, so that a step has the same groups
    on any number of ranks.
    """
    groups = groups_of(trajectories)
    ends = list(itertools.accumulate(len(group) for group in groups))
    rank = ranks.rank if ranks is not None else 0
    mine = [(group[0].prompt.draw, rank, g) for g, group in enumerate(groups)]
    everywhere = sorted(place for part in (ranks.gather(mine) if ranks is not None else [mine]) for place in part)
    share = -(-len(everywhere) // minis)
    parts = [everywhere[m * share : (m + 1) * share] for m in range(minis)]
    return [
        [i for _, owner, g in part if owner == rank for i in range(ends[g] - len(groups[g]), ends[g])] for part in parts
    ]


def resume_position(context: StageContext, own: Mapping[str, Any], sampler: RolloutSampler, method: Method) -> None:
    """Take up where the checkpoint left sampler and method, on the same or another number of ranks.

    Raises:
        UserError: every rank had its own state, and there are now more or fewer ranks.
    """
    world, drawn, states = context.ranks.world, own["drawn"], own["method"]
    if isinstance(drawn[0], list):  # an older version, in which every rank had its own share of the data
        if len(drawn) > 1:
            raise UserError(
                f"the checkpoint of stage {context.name} was written by {len(drawn)} ranks of an older version of "
                "thence, which dealt the data to ranks in another way",
                remedy="finish the run with that version, or give another --folder",
                file=context.folder.stage(context.name) / "checkpoints",
            )
        drawn = drawn[0]
    if len(states) not in (1, world):
        raise UserError(
            f"method {method.name} keeps a state for each rank: {len(states)} ranks wrote the checkpoint, "
            f"and now there are {world}",
            remedy=f"resume with {len(states)} ranks (torchrun --nproc-per-node {len(states)}), or --restart",
            file=context.folder.stage(context.name) / "checkpoints",
        )
    sampler.drawn, sampler.expert_drawn = drawn
    method.restore(states[context.ranks.rank if len(states) > 1 else 0])


def same_or_each(states: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One state if all ranks have the same, which any number of ranks can take up; else that of each."""
    return list(states[:1]) if all(state == states[0] for state in states) else list(states)

"""A response of the probe as a rollout of several turns, for the cases of ``_thence_rl.py``."""

from __future__ import annotations

from typing import Any


def in_turns(trajectory: Any) -> Any:
    """The same row as a rollout of several turns, in which an environment said every third token."""
    from dataclasses import replace

    from thence.data.trajectory import Observation

    ids, said = trajectory.response_ids, environment(len(trajectory.response_ids))
    observations = tuple(Observation(place - i, (ids[place],)) for i, place in enumerate(said))
    return replace(
        trajectory, response_ids=tuple(t for i, t in enumerate(ids) if i not in said), observations=observations
    )


def environment(tokens: int) -> list[int]:
    """Places of a response of so many tokens that the environment wrote: neither the first nor the last one."""
    return list(range(2, tokens - 1, 3))

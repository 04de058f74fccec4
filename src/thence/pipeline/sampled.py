"""What faults of reinforcement learning may know of a rollout batch beside the weights of its tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from thence.data.trajectory import Trajectory
from thence.methods.base import Method, reward_of
from thence.methods.groups import group_numbers
from thence.methods.grpo import Grpo
from thence.methods.gspo import Gspo
from thence.objective import Generation, Sampled


def sampled_of(
    method: Method,
    trajectories: Sequence[Trajectory],
    old: Mapping[int, Tensor],
    trust: Sequence[Tensor] | None,
    bound: float | None,
) -> list[Sampled] | None:
    """How the responses of a rollout batch came about; None: the method's weights are more than advantages.

    Args:
        old: log-probabilities under the policy that sampled, by the trajectory's place; empty: it has not moved since.
        trust: importance weights of each trajectory's tokens; None: there is no such correction.
        bound: that they are truncated at.
    """
    if not isinstance(method, Grpo):
        return None
    options, by_sequence = method.options, isinstance(method, Gspo)
    generation = Generation(
        torch.tensor([reward_of(trajectory) for trajectory in trajectories], dtype=torch.float64),
        group_numbers(trajectories),
        options.std,
        by_sequence,
        *((options.clip_low, options.clip_high) if by_sequence else ()),
    )
    advantages = method.advantages(trajectories).tolist()
    found = []
    for i, trajectory in enumerate(trajectories):
        given, written = trajectory.sampler_logps, torch.tensor(trajectory.after_prompt()[1])
        found.append(
            Sampled(
                generation,
                i,
                advantages[i],
                len(trajectory.prompt.token_ids),
                truncated=trajectory.finish == "length",
                environment=~written if trajectory.observations else None,
                old=_over(written, old.get(i)),
                sampler=None
                if given is None or trajectory.origin != "rollout"
                else _over(written, torch.tensor(given)),
                trust=None if trust is None else _over(written, trust[i]),
                bound=math.inf if bound is None else bound,
            )
        )
    return found


def _over(written: Tensor, own: Tensor | None) -> Tensor | None:
    """Values of the policy's own tokens, shape (n,), as values of all R tokens of the response: 0 for the others."""
    if own is None or len(own) == len(written):
        return own
    whole = torch.zeros(len(written), dtype=own.dtype)
    whole[written] = own
    return whole

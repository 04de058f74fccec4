"""How responses came about: what the step itself does not look at, and faults of reinforcement learning do."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Generation:
    """Responses that were sampled and rewarded at once, and the rules that their weights follow.

    Args:
        rewards: of all its responses, shape (N,), float64.
        groups: number of each one's group, shape (N,), int64.
        std: advantages are divided by the group's standard deviation.
        sequence_ratio: weights hold the ratio of the whole response, clipped (GSPO).
        clip_low, clip_high: range of that ratio.
    """

    rewards: Tensor
    groups: Tensor
    std: bool = False
    sequence_ratio: bool = False
    clip_low: float = math.inf
    clip_high: float = math.inf


@dataclass(frozen=True, eq=False)
class Sampled:
    """How the response of one row came about. It has R tokens, trained or not.

    Args:
        generation: that it belongs to.
        place: among the generation's responses.
        advantage: that its weights hold.
        start: place of the response's first token in the row.
        truncated: cut at the length limit.
        environment: tokens that the policy did not write, shape (R,), bool; None: there are none.
        old: log-probabilities under the policy before the generation's first step, nats, shape (R,); None: the policy
            has not moved since.
        reference: the same under the reference policy of a KL term.
        sampler: the same as the engine that sampled gave them.
        trust: truncated importance weights that the weights hold, shape (R,); None: there is no such correction.
        bound: that they are truncated at.
    """

    generation: Generation
    place: int
    advantage: float
    start: int
    truncated: bool = False
    environment: Tensor | None = None
    old: Tensor | None = None
    reference: Tensor | None = None
    sampler: Tensor | None = None
    trust: Tensor | None = None
    bound: float = math.inf

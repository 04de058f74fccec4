"""A moving average of the policy's weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from thence.train.policy import Policy


class MovingAverage:
    """A second copy of the policy, laid out as it, that follows it.

    Args:
        policy: the copy; it starts as the average.
        rate: share of the followed weights in the average after every step.
    """

    def __init__(self, policy: Policy, rate: float):
        self.policy, self.rate = policy, rate

    @torch.no_grad()
    def follow(self, policy: Policy) -> None:
        """Move towards the policy's weights: average = (1 - rate) average + rate weights."""
        now = dict(policy.model.named_parameters())
        for name, mean in self.policy.model.named_parameters():
            _own(mean).mul_(1 - self.rate).add_(_own(now[name]), alpha=self.rate)

    def weights(self) -> dict[str, Tensor]:
        """The average by parameter; shards as shards."""
        return {name: parameter.detach() for name, parameter in self.policy.model.named_parameters()}

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`weights` gave."""
        for name, parameter in self.policy.model.named_parameters():
            parameter.copy_(weights[name])


def _own(value: Tensor) -> Tensor:
    """What this rank holds of a parameter."""
    return value.to_local() if isinstance(value, DTensor) else value

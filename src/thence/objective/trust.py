"""Surrogates that weigh log pi by a detached ratio, capped or masked: CISPO, DPPO, IPO.

Their value is ``factor * logp`` with a factor that has no gradient, so the slope is the factor: the ratio where nothing
acts. CISPO: arXiv 2506.13585 eq. 4 and 5. DPPO: arXiv 2602.04879. IPO: the trainer prime-rl.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thence.objective.surrogates import Context, log_ratio

Measure = Literal["tv", "kl", "band"]


@dataclass(frozen=True)
class CappedRatio:
    """CAPPED_RATIO: ``sg(min(max(r, floor), cap)) log pi``. No token is dropped.

    Args:
        floor, cap: bounds of the ratio itself, not of its distance from one.
    """

    floor: float = 0.0
    cap: float = 5.0

    def value(self, logp_T: Tensor, context: Context) -> Tensor:
        return self.slope(logp_T, context).detach() * logp_T

    def slope(self, logp_T: Tensor, context: Context) -> Tensor:
        return log_ratio(logp_T, context.behaviour_T).exp().clamp(self.floor, self.cap)

    def held_back(self, logp_T: Tensor, context: Context) -> Tensor:
        """Where a bound changes the ratio. Shape (T,), bool."""
        ratio_T = log_ratio(logp_T, context.behaviour_T).exp()
        return (ratio_T > self.cap) | (ratio_T < self.floor)


@dataclass(frozen=True)
class TrustMask:
    """TRUST_MASK: ``sg(min(r, cap) keep) log pi``: tokens beyond a trust region of probabilities have no weight.

    With ``d = pi - pi_behaviour`` of the token that was taken and the sign of the weight:

    - ``tv``: keep where d <= high for a positive weight, d >= -low for another.
    - ``kl``: keep where KL(Bernoulli(pi_behaviour) || Bernoulli(pi)) is at most high (positive weight) or low, or where
      the weight pulls the token back: d <= 0 for a positive weight, d >= 0 for another.
    - ``band``: keep where -low <= d <= high, whatever the weight.

    Args:
        measure: of the change of the policy at the token.
        low, high: its bounds.
        cap: of the ratio.
    """

    measure: Measure = "tv"
    low: float = 0.15
    high: float = 0.15
    cap: float = math.inf

    def value(self, logp_T: Tensor, context: Context) -> Tensor:
        return self.slope(logp_T, context).detach() * logp_T

    def slope(self, logp_T: Tensor, context: Context) -> Tensor:
        ratio_T = log_ratio(logp_T, context.behaviour_T).exp().clamp(max=self.cap)
        return ratio_T * (~self.held_back(logp_T, context)).to(ratio_T.dtype)

    def held_back(self, logp_T: Tensor, context: Context) -> Tensor:
        """Where the mask takes the weight. Shape (T,), bool."""
        if context.behaviour_T is None:
            return torch.zeros_like(logp_T, dtype=torch.bool)
        p_T, old_T = logp_T.detach().exp(), context.behaviour_T.exp()
        change_T, up_T = p_T - old_T, context.weight_T > 0
        if self.measure == "tv":
            return torch.where(up_T, change_T > self.high, change_T < -self.low)
        if self.measure == "band":
            return (change_T > self.high) | (change_T < -self.low)
        far_T = binary_kl(logp_T.detach(), context.behaviour_T)
        away_T = torch.where(up_T, change_T > 0, change_T < 0)
        return away_T & (far_T > torch.where(up_T, self.high, self.low))


def binary_kl(logp_T: Tensor, behaviour_T: Tensor) -> Tensor:
    """KL of "this token or another one" under the behaviour policy from that under the policy, nats. Shape (T,).

    ``b log(b / p) + (1 - b) log((1 - b) / (1 - p))``; infinite where the policy has put all of its mass on a token
    that the behaviour policy could have missed. A log-probability of zero is one.
    """
    old_T = behaviour_T.exp()
    missed_T, old_missed_T = (-torch.expm1(logp_T)).clamp(min=0), (-torch.expm1(behaviour_T)).clamp(min=0)
    rest_T = torch.where(old_missed_T > 0, old_missed_T * (old_missed_T.log() - missed_T.log()), 0.0)
    taken_T = torch.where(old_T > 0, old_T * (behaviour_T - logp_T), 0.0)
    return taken_T + rest_T


@dataclass(frozen=True)
class SquaredGap:
    """SQUARED_GAP: ``-(log pi - log pi_behaviour)^2``, a pull back to the policy that sampled."""

    def value(self, logp_T: Tensor, context: Context) -> Tensor:
        return -log_ratio(logp_T, context.behaviour_T).square()

    def slope(self, logp_T: Tensor, context: Context) -> Tensor:
        return -2 * log_ratio(logp_T.detach(), context.behaviour_T)

"""CISPO (arXiv 2506.13585 eq. 4 and 5): the ratio is bounded, and no token loses its gradient.

    L = - (1 / N) sum_i sum_t A_i sg(min(max(r_it, floor), cap)) log pi(y_it),   A_i = (R_i - mean) / (std + 1e-6)

N response tokens in the step, sg: a constant to the gradient. Where PPO's clip gives a token no weight, CISPO gives it
the weight of the bound. ``cap`` and ``floor`` bound the ratio itself. The published run has no floor; its cap is not
public. 5 is the value that ScaleRL (arXiv 2510.13786) settles on.

Elsewhere: TRL's ``loss_type="cispo"`` takes the cap from ``epsilon_high``, which is 0.2 (``epsilon``) if it is not set:
every ratio is then cut to a fifth or less, and cispo is a fifth of the policy gradient without a ratio. verl's bounds
are 1 - clip_ratio_low and 1 + clip_ratio_high, 0.8 and 1.2 by default: ``floor = 0.8, cap = 1.2`` here.

The ratio is one before the first optimizer step of a rollout batch, so the bound acts with several (``mini_batch``).
The logged loss is the weighted log-probability; ``clip_share`` counts tokens whose ratio a bound changes.
"""

from __future__ import annotations

from pydantic import model_validator

from thence.methods.grpo import GroupOptions, Grpo
from thence.objective import CappedRatio, Surrogate
from thence.settings.limits import Share, SomeCoefficient


class CispoOptions(GroupOptions):
    """Settings of CISPO."""

    cap: SomeCoefficient = 5.0
    """Largest ratio. It bounds the ratio itself: 1.2 where verl has clip_ratio_high = 0.2."""
    floor: Share = 0.0
    """Smallest ratio. 0: none."""
    std: bool = True
    """Divide advantages by the group's standard deviation."""

    @model_validator(mode="after")
    def _cap_above_one(self) -> CispoOptions:
        if self.cap < 1:
            raise ValueError(f"cap bounds the ratio, which is one before the first step; {self.cap:g} is less")
        return self


class Cispo(Grpo):
    """Policy gradient with group advantages and bounded weights of importance."""

    name = "cispo"
    formula = "-(1/N) sum A sg(clip(r, floor, cap)) log pi, A = (R - mean)/std, cap 5, no floor"
    source = "arXiv 2506.13585 eq. 4 and 5; the cap from arXiv 2510.13786"
    exactness = "exact"
    needs_several_steps = True
    Options = CispoOptions

    @property
    def surrogate(self) -> Surrogate:
        return CappedRatio(self.options.floor, self.options.cap)

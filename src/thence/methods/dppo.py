"""DPPO (arXiv 2602.04879): a trust region of probabilities in place of a clipped ratio. And IPO of prime-rl.

    L = - (1 / N) sum_i sum_t A_i sg(min(r_it, bound) keep_it) log pi(y_it)  + kappa (log pi - log pi_old)^2
    tv:  keep where pi - pi_old <= high (A > 0), >= -low (A < 0)
    kl:  keep where KL(Bernoulli(pi_old) || Bernoulli(pi)) <= high (A > 0), <= low (A < 0), or the step leads back

N response tokens in the step, A_i = R_i - mean. A ratio says little about a rare token: from 0.01 to 0.05 it is 5, and
PPO's clip holds the token back, though 4% of the probability moved. DPPO looks at the probability. Bounds: 0.15 (tv)
and 0.05 (kl), verl's examples; prime-rl has 0.2 and kappa = 0.001, where pi_old is the sampler's own.

Elsewhere: verl 0.9.1 takes the bounds from ``clip_ratio_low`` and ``clip_ratio_high`` (0.2 if they are not set) and the
largest ratio from ``clip_ratio_c``, whose default of 3 was meant for PPO's dual clip: with it, ratios above 3 are cut.

IPO keeps a token where |pi - pi_old| <= bound, whatever its advantage, has the same kappa, and no cap. prime-rl (commit
559b447 of August 2026) takes pi_old from the sampler for both; here it is the trainer's own log-probability, which
``rl.importance_bound`` corrects.

The policy has not moved before the first optimizer step of a rollout batch, so both act with several (``mini_batch``).
The logged loss is the weighted log-probability; ``clip_share`` counts tokens that the mask takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from thence.data.trajectory import Trajectory
from thence.methods.base import TokenFacts, Weights
from thence.methods.grpo import GroupOptions, Grpo
from thence.objective import SquaredGap, Surrogate, Term, TrustMask
from thence.settings.limits import Ceiling, Coefficient


class TrustOptions(GroupOptions):
    """Settings that masks of a trust region share."""

    ratio_bound: Ceiling = 1e4
    """Largest ratio. inf: off."""
    kappa: Coefficient = 0.0
    """Coefficient of the squared distance of the log-probability from the old one. 0: off."""


class DppoOptions(TrustOptions):
    """Settings of DPPO."""

    divergence: Literal["tv", "kl"] = "tv"
    """What is bounded. tv: the change of the token's probability. kl: the KL between taking it and another one."""
    low: Coefficient | None = None
    """Bound for negative advantages. none: 0.15 (tv), 0.05 (kl)."""
    high: Coefficient | None = None
    """Bound for positive advantages. none: 0.15 (tv), 0.05 (kl)."""


BOUNDS = {"tv": 0.15, "kl": 0.05}


class Dppo(Grpo):
    """Policy gradient with group advantages, masked outside a trust region of probabilities."""

    name = "dppo"
    formula = "-(1/N) sum A sg(min(r, 1e4) keep) log pi, keep: pi - pi_old <= 0.15 if A > 0, >= -0.15 if A < 0"
    source = "arXiv 2602.04879, with the bounds of verl's examples"
    exactness = "exact"
    needs_several_steps = True
    Options = DppoOptions

    @property
    def surrogate(self) -> Surrogate:
        o = self.options
        low, high = (BOUNDS[o.divergence] if bound is None else bound for bound in (o.low, o.high))
        return TrustMask(o.divergence, low, high, o.ratio_bound)

    @property
    def terms(self) -> tuple[Term, ...]:
        policy, *rest = super().terms
        pull = [Term("pull", SquaredGap(), policy.normaliser)] if self.options.kappa else []
        return (policy, *pull, *rest)

    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Weights]:
        found = super().weigh(trajectories, facts)
        if not self.options.kappa:
            return found
        return [
            {**weights, "pull": self.options.kappa * self.share(trajectory)}
            for trajectory, weights in zip(trajectories, found, strict=True)
        ]


class IpoOptions(TrustOptions):
    """Settings of IPO."""

    bound: Coefficient = 0.1
    """Largest change of the token's probability, up or down."""
    ratio_bound: Ceiling = math.inf
    """Largest ratio. inf: off."""
    kappa: Coefficient = 1e-3
    """Coefficient of the squared distance of the log-probability from the old one. 0: off."""


class Ipo(Dppo):
    """Policy gradient with group advantages; a token whose probability has moved too far has no weight."""

    name = "ipo"
    formula = "-(1/N) sum A sg(r keep) log pi + 0.001 (log pi - log pi_old)^2, keep: |pi - pi_old| <= 0.1"
    source = "the trainer prime-rl, commit 559b447"
    exactness = "exact"
    Options = IpoOptions

    @property
    def surrogate(self) -> Surrogate:
        o = self.options
        return TrustMask("band", o.bound, o.bound, o.ratio_bound)

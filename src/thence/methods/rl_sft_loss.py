"""RL with SFT loss, a baseline of LUFFY (arXiv 2504.14945): policy gradient and likelihood of a demonstration, added.

    L = - (1 / Z) sum over own tokens  r A_i  -  (c / Z_demo) sum over expert tokens  log pi  -  eta * entropy
    A_i = R_i - mean over the prompt's own responses,   c = 1

A prompt with a demonstration has n - 1 rollouts and the demonstration; one without has n rollouts. The ratio is not
clipped. ``normaliser``: ``clean`` divides both sums by all response tokens of the step; ``code`` the first by 8 ranks
times 8192 tokens and the second by the expert tokens of the step (the released trainer takes that mean in every
micro-batch and adds the means, so that its mixture also depends on packing); ``paper`` is the same as ``clean``, for
the paper prints no other.
"""

from __future__ import annotations

from collections.abc import Sequence

from thence.data.trajectory import Trajectory
from thence.methods.base import TokenFacts, Weights, switched_on
from thence.methods.mixed import (
    MixedOptions,
    WithDemonstration,
    advantages,
    entropy_term,
    likelihood_normaliser,
    policy_normaliser,
)
from thence.objective import Logp, Ratio, Term
from thence.settings.limits import Coefficient


class RlSftLossOptions(MixedOptions):
    """Settings of RL with SFT loss."""

    coefficient: Coefficient = 1.0
    """Coefficient of the demonstrations' likelihood term."""


class RlSftLoss(WithDemonstration):
    """Policy gradient on own responses, maximum likelihood on demonstrations."""

    name = "rl_sft_loss"
    formula = "-(1/Z) sum_own r A - (1/Z_demo) sum_expert log pi, A = R - mean of the own responses"
    source = "arXiv 2504.14945, the baseline of its released scripts"
    exactness = "exact"
    Options = RlSftLossOptions

    @property
    def terms(self) -> tuple[Term, ...]:
        o = self.options
        policy = Term("policy", Ratio(), policy_normaliser(o))
        return (policy, Term("likelihood", Logp(), likelihood_normaliser(o)), *entropy_term(o))

    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Weights]:
        o = self.options
        own = advantages(trajectories, o.std, own_only=True).tolist()
        weights = []
        for trajectory, advantage in zip(trajectories, own, strict=True):
            policy, likelihood = (0.0, o.coefficient) if trajectory.origin == "demonstration" else (advantage, 0.0)
            weights.append({"policy": policy, "likelihood": likelihood, **switched_on(entropy=o.entropy)})
        return weights

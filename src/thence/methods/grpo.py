"""Group relative policy optimisation, with the paper's settings as defaults.

    L = - sum_i sum_t min(r A_i, clip(r, 1 - low, 1 + high) A_i) / Z  (+ kl * k3),   A_i = R_i - mean of the group

Defaults (arXiv 2604.23747, section 4): one token mean over the step, clip 0.2 / 0.28, no division by the group's
standard deviation, no KL. The original (arXiv 2402.03300 eq. 3, DeepSeekMath) is
``aggregation = "sequence-mean", std = true, clip_high = 0.2, kl = 0.04``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from thence.data.trajectory import Trajectory
from thence.methods.base import Method, Options, TokenFacts, Weights, reward_of, switched_on
from thence.methods.groups import group_numbers
from thence.objective import Clip, Entropy, NegativeKl, Normaliser, Surrogate, Term, group_advantages
from thence.settings.limits import Ceiling, Coefficient, Signed, Tokens


class GroupOptions(Options):
    """Settings that the GRPO family shares, whatever its surrogate."""

    std: bool = False
    """Divide advantages by the group's standard deviation."""
    singleton: Literal["zero", "reward"] = "zero"
    """Advantage of a single response in its group."""
    aggregation: Literal["token-mean", "sequence-mean", "constant"] = "token-mean"
    """token-mean: over all tokens of the step. sequence-mean: over each response, then over responses. constant: the
    sum divided by responses times `constant_tokens` (Dr. GRPO)."""
    constant_tokens: Tokens = 8192
    """The constant length of aggregation = "constant"."""
    kl: Coefficient = 0.0
    """Coefficient of the KL to the model at the start of the stage."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL. k3 is GRPO's; k1 has no gradient in expectation."""
    entropy: Signed = 0.0
    """Coefficient of the entropy bonus."""


class GrpoOptions(GroupOptions):
    """Settings of GRPO."""

    clip_low: Coefficient = 0.2
    """Clip range of the ratio below one."""
    clip_high: Coefficient = 0.28
    """Clip range of the ratio above one."""
    dual_clip: Ceiling = math.inf
    """Dual clip: largest ratio of a negative advantage. inf: off."""


class Grpo(Method):
    """Clipped policy gradient with group advantages."""

    name = "grpo"
    stage = "rl"
    formula = "-(1/N) sum min(r A, clip(r, 0.8, 1.28) A), A = R - group mean, N = response tokens of the step"
    source = "arXiv 2402.03300 eq. 3 with the settings of arXiv 2604.23747 section 4"
    exactness = "exact"
    not_ahead = ""
    Options = GrpoOptions

    @property
    def least_rollouts(self) -> int:
        """Alone in its group, a response has no advantage, unless ``singleton`` makes that its reward."""
        return 1 if self.options.singleton == "reward" else 2

    @property
    def surrogate(self) -> Surrogate:
        """What every token's advantage weighs."""
        o = self.options
        return Clip(o.clip_low, o.clip_high, o.dual_clip)

    @property
    def terms(self) -> tuple[Term, ...]:
        o = self.options
        normaliser = {
            "token-mean": Normaliser("tokens"),
            "sequence-mean": Normaliser("sequences"),
            "constant": Normaliser("sequences", float(o.constant_tokens)),
        }[o.aggregation]
        terms = [Term("policy", self.surrogate, normaliser)]
        if o.kl:
            terms.append(Term("kl", NegativeKl(o.kl_estimator), normaliser))
        if o.entropy:
            terms.append(Term("entropy", Entropy(), Normaliser("tokens")))
        return tuple(terms)

    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Weights]:
        o = self.options
        advantages = self.advantages(trajectories).tolist()
        weights = []
        for trajectory, advantage in zip(trajectories, advantages, strict=True):
            share = self.share(trajectory)
            weights.append({"policy": advantage * share, **switched_on(kl=o.kl * share, entropy=o.entropy)})
        return weights

    def share(self, trajectory: Trajectory) -> float:
        """What the weight of each of a response's tokens is multiplied by before the term's normaliser divides it."""
        by_response = self.options.aggregation == "sequence-mean"
        return 1 / max(len(trajectory.response_ids), 1) if by_response else 1.0

    def advantages(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """One advantage a trajectory, shape (N,), float64; groups are the trajectories of one draw of a prompt."""
        rewards = torch.tensor([reward_of(trajectory) for trajectory in trajectories], dtype=torch.float64)
        groups = group_numbers(trajectories)
        return group_advantages(rewards, groups, std=self.options.std, singleton=self.options.singleton)

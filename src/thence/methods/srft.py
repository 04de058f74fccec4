"""SRFT (arXiv 2506.19767): supervised and reinforced in one step, both weighted by the policy's entropy H.

    L = - sum over expert tokens    (0.5 exp(s H) log pi / Z_demo  +  A_i f(pi) / Z)
        - sum over right own tokens  0.1 exp(H) log pi / Z
        + sum over wrong own tokens  log pi / Z                          - eta * entropy
    A_i = R_i - mean over own and expert responses of the prompt;   f(x) = x / (x + gamma);   s = -1

Only the expert's term has an advantage; own responses count by right (score 1 or more) or wrong alone, without ratio,
clip or baseline. H is that of the policy before the optimizer step, without gradient. Where the sources differ:

* ``sft_entropy_sign``: -1 in the paper; +1 in the official code, by two audits of it.
* ``demonstration``: plain ``probability`` in the paper, LUFFY's ``shape`` in the codes.
* ``std``: the paper divides A by the group's standard deviation, the re-implementation in HPT's code does not.
* ``entropy_level``: the paper does not say what H is taken over; HPT's code takes each sequence, the official code
  starts from the entropies of tokens.
* ``normaliser``: ``code`` divides by 8 ranks times 8192 tokens, and the expert's log-likelihood by the expert tokens of
  the step. The paper prints expectations without saying over what, so ``paper`` is the same as ``clean`` here.

The log-likelihood of wrong responses is pushed down without bound: expect that term to rule where most are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from thence.data.trajectory import Trajectory
from thence.methods.base import TokenFacts, Weights, reward_of, switched_on
from thence.methods.mixed import (
    MixedOptions,
    WithDemonstration,
    advantages,
    entropy_term,
    likelihood_normaliser,
    policy_normaliser,
)
from thence.objective import Logp, Prob, Ratio, Shape, Surrogate, Term
from thence.settings.limits import Coefficient, SomeCoefficient

ENTROPY_UNIT = 2.0**-32  # nats; ranks add their entropies as integers of this unit


class SrftOptions(MixedOptions):
    """Settings of SRFT."""

    sft_entropy_sign: Literal[-1, 1] = -1
    """Sign of H in the weight of the expert's log-likelihood: -1 paper, 1 official code."""
    entropy_level: Literal["sequence", "token", "batch"] = "sequence"
    """H is the mean over a response, the token's own, or the mean over all responses of the optimizer step."""
    demonstration: Literal["shape", "probability"] = "shape"
    """Surrogate of expert tokens with advantages. shape: pi / (pi + gamma), the codes. probability: pi, the paper."""
    gamma: SomeCoefficient = 0.1
    """Gamma of the shaping."""
    own: Literal["logp", "probability", "ratio"] = "logp"
    """Surrogate of sampled tokens: log pi (paper, codes; log pi - log pi_old has the same gradient), pi or ratio."""
    sft_weight: Coefficient = 0.5
    """Constant of the expert's log-likelihood."""
    right_weight: Coefficient = 0.1
    """Constant of right sampled responses."""
    wrong_weight: Coefficient = 1.0
    """Constant of wrong sampled responses."""


class Srft(WithDemonstration):
    """Two terms on the demonstration, one on own responses, weighted by entropy."""

    name = "srft"
    formula = "-sum_expert (0.5 e^-H log pi + A f(pi)) - sum_right 0.1 e^H log pi + sum_wrong log pi, each over Z"
    source = "arXiv 2506.19767 eq. 4-11, with H and f as in the re-implementation in HPT's code"
    exactness = "exact"
    uses_facts = True
    Options = SrftOptions

    @property
    def terms(self) -> tuple[Term, ...]:
        o, normaliser = self.options, policy_normaliser(self.options)
        own: Surrogate = {"logp": Logp(), "probability": Prob(), "ratio": Ratio()}[o.own]
        expert: Surrogate = {"shape": Shape(o.gamma), "probability": Prob()}[o.demonstration]
        return (
            Term("policy", own, normaliser),
            Term("demonstration", expert, normaliser),
            Term("likelihood", Logp(), likelihood_normaliser(o)),
            *entropy_term(o),
        )

    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Weights]:
        o = self.options
        weights = []
        values = advantages(trajectories, o.std).tolist()
        for trajectory, advantage, entropy_n in zip(trajectories, values, self._entropies(facts), strict=True):
            if trajectory.origin == "demonstration":
                likelihood = o.sft_weight * torch.exp(o.sft_entropy_sign * entropy_n)
                found = {"policy": 0.0, "demonstration": advantage, "likelihood": likelihood}
            else:
                right = reward_of(trajectory) >= 1
                own = o.right_weight * torch.exp(entropy_n) if right else -o.wrong_weight
                found = {"policy": own, "demonstration": 0.0, "likelihood": 0.0}
            weights.append({**found, **switched_on(entropy=o.entropy)})
        return weights

    def rewarded(self, trajectory: Trajectory) -> bool:
        """The demonstration has an advantage too."""
        return True

    def _entropies(self, facts: Sequence[TokenFacts]) -> list[Tensor]:
        """H at every response token of each trajectory, shape (n,), float64."""
        entropies = [fact.entropy.double() for fact in facts]
        if self.options.entropy_level == "token":
            return entropies
        if self.options.entropy_level == "sequence":
            return [torch.full_like(e, float(e.mean()) if len(e) else 0.0) for e in entropies]
        # rounded response by response: a rank's own sum would round in another way on another number of ranks
        units = sum(round(float(e.sum()) / ENTROPY_UNIT) for e in entropies)
        total = self._over_ranks(units) * ENTROPY_UNIT
        mean = total / max(self._over_ranks(sum(len(e) for e in entropies)), 1)
        return [torch.full_like(e, mean) for e in entropies]

    def _over_ranks(self, count: int) -> int:
        return count if self.sampler is None else self.sampler.total(count)

"""LUFFY (arXiv 2504.14945 eq. 5-8): one demonstration inside every group, acting through its shaped probability.

    L = - (1 / Z) [ sum over own tokens  r A_i  +  sum over expert tokens  f(pi) A_i ] - eta * entropy
    f(x) = x / (x + gamma),   A_i = R_i - mean over own and expert responses of the prompt

A prompt with a demonstration has n - 1 rollouts and the demonstration, graded by the same verifier; one without has n
rollouts. ``r`` is not clipped, as in the released main run; ``clip = true`` clips it as eq. 6 prints it, with the
bounds of the released code. Expert tokens are never clipped. ``normaliser = "paper"`` (Z = all response tokens) is the
same as ``clean``; ``code`` divides by 8 ranks times 8192 tokens. The released code has an entropy coefficient of 0.001
and no standard deviation; the text says 0.01 (``entropy``), the printed equation divides by it (``std``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from thence.data.trajectory import Trajectory
from thence.methods.base import TokenFacts, Weights, switched_on
from thence.methods.mixed import MixedOptions, WithDemonstration, advantages, entropy_term, policy_normaliser
from thence.objective import Clip, Logp, Prob, Ratio, Shape, Surrogate, Term
from thence.settings.limits import Coefficient, PartShare, SomeCoefficient


class LuffyOptions(MixedOptions):
    """Settings of LUFFY."""

    shaping: Literal["shape", "probability", "logp"] = "shape"
    """Surrogate of expert tokens. shape: pi / (pi + gamma). probability: pi. logp: log pi."""
    gamma: SomeCoefficient = 0.1
    """Gamma of the shaping. The paper tried 0.05 to 0.5."""
    demonstration_weight: Coefficient = 1.0
    """Factor of the expert tokens' term. 1 in the released run."""
    clip: bool = False
    """Clip the own tokens' ratio to 1 - clip_range ... max(clip_upper, 1 + clip_range); off in the released run."""
    clip_range: PartShare = 0.2
    """Clip range of the ratio below one, and above it unless `clip_upper` is larger."""
    clip_upper: Coefficient = 1.0
    """Upper bound of the ratio, if it is larger than 1 + clip_range."""


class Luffy(WithDemonstration):
    """Policy gradient on groups that hold a demonstration."""

    name = "luffy"
    formula = "-(1/Z) [sum_own r A + sum_expert pi/(pi + 0.1) A], A = R - mean of the group with its demonstration"
    source = "arXiv 2504.14945 eq. 5-8 with the settings of the released main run"
    exactness = "exact"
    Options = LuffyOptions

    @property
    def terms(self) -> tuple[Term, ...]:
        o, normaliser = self.options, policy_normaliser(self.options)
        own: Surrogate = Clip(o.clip_range, max(o.clip_upper, 1 + o.clip_range) - 1) if o.clip else Ratio()
        expert: Surrogate = {"shape": Shape(o.gamma), "probability": Prob(), "logp": Logp()}[o.shaping]
        return (Term("policy", own, normaliser), Term("demonstration", expert, normaliser), *entropy_term(o))

    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Weights]:
        o = self.options
        weights = []
        for trajectory, advantage in zip(trajectories, advantages(trajectories, o.std).tolist(), strict=True):
            expert = trajectory.origin == "demonstration"
            policy, shown = (0.0, o.demonstration_weight * advantage) if expert else (advantage, 0.0)
            weights.append({"policy": policy, "demonstration": shown, **switched_on(entropy=o.entropy)})
        return weights

    def rewarded(self, trajectory: Trajectory) -> bool:
        """The demonstration has an advantage too."""
        return True

"""On-policy RL, the baseline of the mixed-policy papers (arXiv 2504.14945): own responses only, the clip kept.

    L = - (1 / Z) sum min(r A_i, clip(r, 0.8, 1.2) A_i) - eta * entropy,   A_i = R_i - mean over the n rollouts

It differs from ``grpo`` in the upper clip bound, the entropy bonus, a lone response's advantage (its reward, as in the
released code) and the normaliser presets: ``code`` divides by 8 ranks times 8192 tokens; ``paper`` (Z = all response
tokens) is the same as ``clean``.
"""

from __future__ import annotations

from collections.abc import Sequence

from thence.data.trajectory import Trajectory
from thence.methods.base import Method, TokenFacts, Weights, switched_on
from thence.methods.mixed import MixedOptions, advantages, entropy_term, policy_normaliser
from thence.objective import Clip, Ratio, Surrogate, Term
from thence.settings.limits import PartShare


class OnPolicyOptions(MixedOptions):
    """Settings of the on-policy baseline."""

    clip: bool = True
    """Clip the ratio. false: the paper's ablation without a clip."""
    clip_range: PartShare = 0.2
    """Clip range of the ratio, below and above one."""


class OnPolicy(Method):
    """Clipped policy gradient, presets as in the mixed-policy papers."""

    name = "on_policy"
    stage = "rl"
    formula = "-(1/Z) sum min(r A, clip(r, 0.8, 1.2) A), A = R - group mean"
    source = "arXiv 2504.14945, the baseline of its released scripts"
    exactness = "exact"
    not_ahead = ""
    Options = OnPolicyOptions

    @property
    def terms(self) -> tuple[Term, ...]:
        o = self.options
        surrogate: Surrogate = Clip(o.clip_range, o.clip_range) if o.clip else Ratio()
        return (Term("policy", surrogate, policy_normaliser(o)), *entropy_term(o))

    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Weights]:
        o = self.options
        bonus = switched_on(entropy=o.entropy)
        return [{"policy": advantage, **bonus} for advantage in advantages(trajectories, o.std).tolist()]

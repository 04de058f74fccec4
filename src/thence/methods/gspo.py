"""GSPO (arXiv 2507.18071): one importance ratio a response, clipped as a whole.

    L = - (1 / B) sum_i min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i),   A_i = (R_i - mean) / (std + 1e-6)
    s_i = exp( (1 / T_i) sum_t [ log pi(y_it) - log pi_old(y_it) ] )

B responses in the step, T_i tokens in response i. The gradient is ``A_i s_i keep_i (1 / T_i) sum_t grad log pi``, with
keep_i = 0 where the clip holds a response back. So each token has the weight ``A_i s_i keep_i / T_i`` on its
log-probability: s_i follows from the policy before the optimizer step and is a constant to it. The logged loss is the
weighted log-probability; it has GSPO's gradient, not its value. A response that is held back has no weight, and all its
tokens count in ``clip_share``.

The bounds are narrow, 3e-4 and 4e-4, because s_i is a geometric mean over the response. The clip acts from the second
optimizer step of a rollout batch on; published: four, so ``mini_batch = prompts / 4``. Every response counts the same;
TRL's default normaliser weighs long ones more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from torch import Tensor

from thence.data.trajectory import Trajectory
from thence.methods.base import Options, TokenFacts, Weights, switched_on
from thence.methods.grpo import Grpo
from thence.objective import Entropy, Logp, Normaliser, Term
from thence.objective.surrogates import LOG_RATIO_LIMIT
from thence.settings.limits import Coefficient, Signed


class GspoOptions(Options):
    """Settings of GSPO."""

    clip_low: Coefficient = 3e-4
    """Clip range of the sequence ratio below one."""
    clip_high: Coefficient = 4e-4
    """Clip range of the sequence ratio above one."""
    std: bool = True
    """Divide advantages by the group's standard deviation."""
    singleton: Literal["zero", "reward"] = "zero"
    """Advantage of a response that is alone in its group."""
    entropy: Signed = 0.0
    """Coefficient of the entropy bonus, a mean over all response tokens."""


class Gspo(Grpo):
    """Policy gradient with group advantages and a clipped ratio of whole responses."""

    name = "gspo"
    formula = "-(1/B) sum_i min(s A, clip(s, 1 - 3e-4, 1 + 4e-4) A), s = exp(mean over tokens of log pi - log pi_old)"
    source = "arXiv 2507.18071 eq. 5 and 7"
    exactness = "exact"
    uses_old = True
    needs_several_steps = True
    Options = GspoOptions

    @property
    def terms(self) -> tuple[Term, ...]:
        policy = Term("policy", Logp(), Normaliser("sequences"))
        return (policy, Term("entropy", Entropy(), Normaliser("tokens"))) if self.options.entropy else (policy,)

    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Weights]:
        entropy = switched_on(entropy=self.options.entropy)
        return [
            {"policy": 0.0 if held else advantage * ratio / max(len(fact.logp), 1), **entropy}
            for fact, (advantage, ratio, held) in zip(facts, self._ratios(trajectories, facts), strict=True)
        ]

    def clipped(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> int:
        held_back = zip(facts, self._ratios(trajectories, facts), strict=True)
        return sum(len(fact.logp) for fact, (_, _, held) in held_back if held)

    def _ratios(
        self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts]
    ) -> Iterator[tuple[float, float, bool]]:
        """Of each response the advantage, the ratio s, and whether the clip holds it back."""
        o = self.options
        for advantage, fact in zip(self.advantages(trajectories).tolist(), facts, strict=True):
            ratio = sequence_ratio(fact.log_ratio)
            held = ratio > 1 + o.clip_high if advantage > 0 else advantage < 0 and ratio < 1 - o.clip_low
            yield advantage, ratio, held


def sequence_ratio(log_ratio_n: Tensor) -> float:
    """s: the geometric mean of the tokens' ratios, with its log clamped to +-20; 1 for a response without tokens."""
    return (
        float(log_ratio_n.double().mean().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()) if len(log_ratio_n) else 1.0
    )

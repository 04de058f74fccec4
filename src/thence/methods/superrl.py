"""SuperRL (arXiv 2506.01096): per prompt the clipped policy gradient, or the demonstration's likelihood.

    L = c L_PG + (1 - c) L_SFT,   L_PG = - (1 / K) sum_k g(r_k, A_k),   L_SFT = - (1 / M) sum_m log pi(y*_m)
    gate = "hard":       c = 1 if any of the K rollouts has a reward above zero
    gate = "advantage":  c = 1 if any has an advantage above zero: a group that is all right learns from the expert too

g is GRPO's clipped ratio, A = (R - mean) / (std + 1e-6), and M = 1 here: a prompt has one demonstration. A prompt
without a demonstration keeps its rollouts.

No code of the authors was available and the formula comes at second hand, hence "reconstruction". Normalisers:
``clean``: all tokens of the step. ``code``: the divisors of the other mixed-policy trainers. ``paper``: the mean over
the B prompts of a step of L as above, with log pi(y*) summed over the demonstration and g read as GRPO prints it, a
mean over the tokens of a response.

A third variant weighs both losses by exp(-2 sigma) with two learned sigmas and adds them to the loss. It is left out:
the weights of a method are constants to the step, and nothing outside the model is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from thence.data.trajectory import Trajectory
from thence.methods.hpt import Gated, GatedOptions
from thence.methods.mixed import advantages
from thence.methods.unknown import all_failed
from thence.objective import Clip, Normaliser
from thence.objective.surrogates import Surrogate
from thence.settings.limits import Coefficient


class SuperRlOptions(GatedOptions):
    """Settings of SuperRL."""

    gate: Literal["hard", "advantage"] = "hard"
    """RL trains a prompt if a rollout has a reward, or an advantage, above zero. Otherwise SFT does."""
    clip_low: Coefficient = 0.2
    """Clip range of the ratio below one."""
    clip_high: Coefficient = 0.2
    """Clip range of the ratio above one."""
    std: bool = True
    """Divide advantages by the group's standard deviation."""
    entropy: Coefficient = 0.0
    """Coefficient of the entropy bonus, a mean over all response tokens."""


class SuperRl(Gated):
    """Rewards where some rollout is worth learning from, the demonstration elsewhere."""

    name = "superrl"
    formula = "-(1/N) [sum min(r A, clip(r) A) over prompts with max R > 0 + sum log pi(y*) over the others]"
    source = "arXiv 2506.01096 at second hand; no released code"
    exactness = "reconstruction"
    Options = SuperRlOptions

    @property
    def surrogate(self) -> Surrogate:
        return Clip(self.options.clip_low, self.options.clip_high)

    def imitates(self, group: Sequence[Trajectory]) -> bool:
        if self.options.gate == "hard":
            return all_failed(group)
        known = [t for t in group if t.score is not None]
        return bool(known) and bool((advantages(known, self.options.std) <= 0).all())

    def printed(self) -> tuple[Normaliser, Normaliser]:
        by_prompt = Normaliser("one", float(self.options.paper_prompts))
        return by_prompt, by_prompt

    def shares(self, group_size: int, tokens: int) -> tuple[float, float]:
        return 1 / max(group_size * tokens, 1), 1.0

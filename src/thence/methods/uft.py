"""UFT (arXiv 2505.16984): the rollouts of a prompt share a hint, the first slices of its demonstration.

    L = - (1 / N) sum_own [ min(r A_i, clip(r, 0.8, 1.2) A_i) + eta H - kl k3 ] - (0.001 / N_hint) sum_hint log pi
    A_i = (R_i - mean) / (std + 1e-6)

The demonstration is cut into ``slices`` equal parts at the tokens round(i / slices * length). In rollout batch s, up to
``hint_steps``, a prompt's hint is its first k parts, and afterwards there is none:

    uft:    k from the binomial distribution of ``slices`` trials, p = 0.05 + 0.45 (1 + cos(pi s / hint_steps))
    r3:     k uniform in 0 ... slices; hint tokens have no loss
    stage:  k = slices - floor(s / floor(hint_steps / (slices + 1))), at least 0

The KL is to the model that the stage began with. Hint tokens have the likelihood term only. Published: 300 hint steps
of 500, n = 4, mini-batches of 64 of 256 prompts, lr 1e-6.

Other than in the released code: it cuts the text between sentences, into min(5, number of sentences) parts, and pastes
the hint as text into a prompt without a chat template. Here the demonstration's tokens are cut, without its end token,
and the hint begins the response, in any template of the data; it counts towards the longest response, and the
verifier reads it too. The code limits logits to +-100 in the hint's term, which is not done here. A prompt without a
demonstration has no hint. Chosen here, since not known: that k of ``r3`` may be 0 and ``slices`` and that its hints end
with ``hint_steps``; that the hint's weight of ``stage`` is that of ``uft``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Literal

import torch

from thence.accounting.work import Outcome, Work
from thence.data.trajectory import Prompt, Trajectory
from thence.methods.base import Method, Options, Sampler, TokenFacts, Weights, switched_on
from thence.methods.mixed import BEGUN, COUNTED, advantages, cosine
from thence.objective import Clip, Entropy, Logp, NegativeKl, Normaliser, Term
from thence.settings.limits import Coefficient, Count, Share, Steps


class UftOptions(Options):
    """Settings of UFT."""

    hints: Literal["uft", "r3", "stage"] = "uft"
    """How the number of slices of a hint is drawn (see the formula)."""
    slices: Count = 5
    """Parts of a demonstration."""
    hint_steps: Steps = 300
    """Rollout batches with hints."""
    p_first: Share = 0.95
    """Probability of each slice in the first rollout batch (uft)."""
    p_last: Share = 0.05
    """Probability of each slice after `hint_steps` (uft)."""
    hint_weight: Coefficient | None = None
    """Coefficient of the hint tokens' likelihood, a mean over them; none: 0.001, and 0 with r3."""
    normaliser: Literal["clean", "code", "paper"] = "clean"
    """clean: policy, KL and entropy over all response tokens of the step, hint tokens included. code, paper: over the
    tokens that the policy wrote. The hint's term is always a mean over the hint tokens."""
    std: bool = True
    """Divide advantages by the group's standard deviation."""
    clip_low: Coefficient = 0.2
    """Clip range of the ratio below one."""
    clip_high: Coefficient = 0.2
    """Clip range of the ratio above one."""
    kl: Coefficient = 0.001
    """Coefficient of the KL (k3) to the model at the start of the stage. 0: no reference model is kept."""
    entropy: Coefficient = 0.001
    """Coefficient of the entropy bonus on the tokens that the policy wrote."""


class Uft(Method):
    """Clipped policy gradient on what follows a hint, and a little likelihood on the hint."""

    name = "uft"
    stage = "rl"
    demonstrations = "begun"
    single_turn = "an expert begins its responses, and the policy continues within that one turn"
    formula = "-(1/N) sum_own min(r A, clip(r) A) - (0.001/N_hint) sum_hint log pi + 0.001 KL, first slices as a hint"
    source = "arXiv 2505.16984 and its released code"
    exactness = "exact"
    not_ahead = BEGUN
    Options = UftOptions

    @property
    def terms(self) -> tuple[Term, ...]:
        o = self.options
        own = Normaliser("tokens" if o.normaliser == "clean" else "term tokens")
        terms = [Term("policy", Clip(o.clip_low, o.clip_high), own), Term("hint", Logp(), Normaliser("term tokens"))]
        if o.kl:
            terms.append(Term("kl", NegativeKl("k3"), own))
        if o.entropy:
            terms.append(Term("entropy", Entropy(), own))
        return tuple(terms)

    @property
    def hint_weight(self) -> float:
        """The coefficient of the hint's likelihood."""
        given = self.options.hint_weight
        return given if given is not None else (0.0 if self.options.hints == "r3" else 0.001)

    def compose(self, sampler: Sampler, prompts: int, n: int) -> list[Trajectory]:
        asked = sampler.next_prompts(prompts)
        hints = [self.hint(sampler, prompt) for prompt in asked]
        with_one = [prompt for prompt, hint in zip(asked, hints, strict=True) if hint]
        without = [prompt for prompt, hint in zip(asked, hints, strict=True) if not hint]
        helped = iter(sampler.continuations(with_one, [hint for hint in hints if hint], n) if with_one else [])
        plain = iter(sampler.rollouts(without, n) if without else [])
        return [t for hint in hints for t in islice(helped if hint else plain, n)]

    def work(self, prompts: int, n: int) -> Work:
        own = prompts * n
        return Work(Outcome(0, 0, own), Outcome(own, own), "how much of a demonstration the responses begin with")

    def hint(self, sampler: Sampler, prompt: Prompt) -> tuple[int, ...]:
        """The tokens that all rollouts of a prompt begin with in this rollout batch."""
        body = (prompt.demonstration_ids or ())[:-1]
        slices = min(self.options.slices, len(body))
        if not slices or sampler.step > self.options.hint_steps:
            return ()
        return body[: round(self.slices_given(sampler, prompt, slices) / slices * len(body))]

    def slices_given(self, sampler: Sampler, prompt: Prompt, slices: int) -> int:
        """k: how many of its slices a prompt is given."""
        o = self.options
        if o.hints == "stage":
            return stage_slices(sampler.step, slices, o.hint_steps)
        if o.hints == "r3":
            return int(sampler.uniform("hint", prompt.index) * (slices + 1))
        p = cosine(sampler.step, o.hint_steps, o.p_first, o.p_last)
        return sum(sampler.uniform("hint", prompt.index, trial) < p for trial in range(slices))

    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Weights]:
        o = self.options
        weights = []
        for trajectory, advantage in zip(trajectories, advantages(trajectories, o.std).tolist(), strict=True):
            n = len(trajectory.response_ids)
            own = (torch.arange(n) >= trajectory.prefix).double()
            bonus = {name: own * weight for name, weight in switched_on(kl=o.kl, entropy=o.entropy).items()}
            weights.append({"policy": own * (advantage or COUNTED), "hint": (1 - own) * self.hint_weight, **bonus})
        return weights


def stage_slices(step: int, slices: int, steps: int) -> int:
    """Slices of a hint by stages of equal length: all at first, none at last."""
    return min(max(slices - step // max(steps // (slices + 1), 1), 0), slices)

"""Prefix-RFT (arXiv 2507.01679): one rollout of every group continues a prefix of the demonstration.

    L = - (1 / Z) sum_i sum_t min(r A_it, clip(r, 0.8, 1.2) A_it), dual clip 3   - eta * entropy
    A_it = (R_i - mean of all n) * keep_it,   keep = 0 on the 80% of prefix tokens with the lowest entropy, else 1

A prompt with a demonstration y* has n - 1 rollouts and one hybrid: the first P tokens of y*, then the policy's own.

    P = floor(l |y*|),  min_prefix <= P <= |y*| - 1,   l = low + u (0.95 - low),  u uniform in [0, 1)
    low = 0.05 + 0.45 (1 + cos(pi s / S)):  0.95 at the first rollout batch, 0.05 at the last

``r`` is the ratio to the policy that sampled the batch on prefix tokens too. Masked tokens stay in Z. The entropies are
the policy's before each optimizer step. A prompt without a demonstration of two tokens has n rollouts.

``estimator``: ``dr_grpo`` is the paper's; ``dr_grpo_prefix`` is the repository's with the group key (prompt, prefix):
plain rollouts are centred by their own mean m0, the continuation gets R_h and the prefix R_h - m0. Which one the main
run used is not public, nor ``min_prefix``. ``normaliser = "paper"`` (Z = all response tokens) is ``clean``.

Other than in the repository: prefix tokens are the demonstration's own, where it decodes them to text and tokenises
that again; there is one demonstration a prompt, where it draws from several. Entropies are ranked over the prefix
tokens of the whole optimizer step over all ranks, as in the paper, where the repository ranks them within a micro-batch
(then the gradient depends on packing).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from thence.accounting.work import Outcome, Work
from thence.data.trajectory import Prompt, Trajectory
from thence.methods.base import Method, Sampler, TokenFacts, Weights, reward_of, switched_on
from thence.methods.groups import group_numbers
from thence.methods.mixed import BEGUN, MixedOptions, advantages, cosine, policy_normaliser
from thence.objective import Clip, Entropy, Logp, Normaliser, Ratio, Surrogate, Term, group_advantages
from thence.settings.limits import Ceiling, Coefficient, Natural, Share, Steps


class PrefixRftOptions(MixedOptions):
    """Settings of Prefix-RFT."""

    estimator: Literal["dr_grpo", "dr_grpo_prefix"] = "dr_grpo"
    """dr_grpo: one group of all n. dr_grpo_prefix: see above."""
    keep_ratio: Share = 0.2
    """Share of prefix tokens that are trained: those with the highest entropy. 1: all."""
    clip_low: Coefficient = 0.2
    """Clip range of the ratio below one."""
    clip_high: Coefficient = 0.2
    """Clip range of the ratio above one."""
    dual_clip: Ceiling = 3.0
    """Dual clip: largest ratio of a negative advantage. inf: off."""
    prefix_surrogate: Literal["clip", "ratio", "logp"] = "clip"
    """Surrogate of prefix tokens. clip: as for other tokens. ratio: the repository's enable_clip = False. logp: its
    replace_old_log_prob = True, a ratio that is always one, with the same gradient."""
    entropy_mode: Literal["response_only", "all"] = "response_only"
    """Tokens with the entropy bonus (a mean over them): without the prefix, or all."""
    high: Share = 0.95
    """Largest fraction of the demonstration."""
    low_first: Share = 0.95
    """Smallest fraction in the first rollout batch."""
    low_last: Share = 0.05
    """Smallest fraction at the end of the schedule."""
    schedule_steps: Steps | None = None
    """Rollout batches of the cosine schedule. none: the stage's. Published: 500, the whole run."""
    min_prefix: Natural = 1
    """Shortest prefix, in tokens. The published value is not known."""

    @model_validator(mode="after")
    def _std_is_defined(self) -> PrefixRftOptions:
        if self.std and self.estimator == "dr_grpo_prefix":
            raise ValueError('std goes with estimator = "dr_grpo" only')
        return self


class PrefixRft(Method):
    """Clipped policy gradient on groups with one rollout that the expert began."""

    name = "prefix_rft"
    stage = "rl"
    demonstrations = "begun"
    single_turn = "an expert begins its responses, and the policy continues within that one turn"
    formula = (
        "-(1/N) sum min(r A k, clip(r, 0.8, 1.2) A k) dual clip 3, A = R - mean of 7 own and 1 begun by the expert"
    )
    source = "arXiv 2507.01679 and its repository"
    exactness = "exact"
    uses_facts = True
    not_ahead = BEGUN
    Options = PrefixRftOptions
    sampler: Sampler | None = None  # of the last batch

    @property
    def terms(self) -> tuple[Term, ...]:
        o, normaliser = self.options, policy_normaliser(self.options)
        clip = Clip(o.clip_low, o.clip_high, o.dual_clip)
        prefix: Surrogate = {"clip": clip, "ratio": Ratio(), "logp": Logp()}[o.prefix_surrogate]
        terms = (Term("policy", clip, normaliser), Term("prefix", prefix, normaliser))
        return (*terms, Term("entropy", Entropy(), Normaliser("term tokens"))) if o.entropy else terms

    def compared(self, trajectory: Trajectory) -> bool:
        """With ``dr_grpo_prefix`` the baseline is that of the plain rollouts."""
        return self.options.estimator == "dr_grpo" or not trajectory.prefix

    def compose(self, sampler: Sampler, prompts: int, n: int) -> list[Trajectory]:
        self.sampler = sampler
        asked = sampler.next_prompts(prompts)
        prefixes = [self.prefix(sampler, prompt) for prompt in asked]
        begun = [prompt for prompt, prefix in zip(asked, prefixes, strict=True) if prefix]
        others = [prompt for prompt, prefix in zip(asked, prefixes, strict=True) if not prefix]
        hybrids = iter(sampler.continuations(begun, [p for p in prefixes if p], 1) if begun else [])
        plain = iter(sampler.rollouts(begun, n - 1) if begun and n > 1 else [])
        whole = iter(sampler.rollouts(others, n) if others else [])
        found: list[Trajectory] = []
        for prefix in prefixes:
            found += [*islice(plain, n - 1), next(hybrids)] if prefix else islice(whole, n)
        return found

    def work(self, prompts: int, n: int) -> Work:
        o = self.options
        fractions = max(o.low_first, o.high), min(o.low_first, o.low_last, o.high)
        least, most = (Outcome(prompts * (n - f), prompts * (n - f), prompts * f) for f in fractions)
        return Work(least, most, "how much of a demonstration the first response of a prompt begins with")

    def prefix(self, sampler: Sampler, prompt: Prompt) -> tuple[int, ...]:
        """The tokens of the demonstration that the hybrid begins with."""
        o, expert = self.options, prompt.demonstration_ids or ()
        low = cosine(sampler.step, o.schedule_steps or sampler.steps, o.low_first, o.low_last)
        fraction = low + sampler.uniform("prefix", prompt.index) * (o.high - low)
        return expert[: prefix_length(fraction, len(expert), o.min_prefix)]

    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Weights]:
        o = self.options
        of_prefix, of_rest = self.advantages(trajectories)
        entropies = [fact.entropy[: t.prefix] for t, fact in zip(trajectories, facts, strict=True)]
        kept = self.kept(trajectories, entropies)
        weights = []
        for i, trajectory in enumerate(trajectories):
            n, prefix = len(trajectory.response_ids), trajectory.prefix
            own = torch.arange(n) >= prefix
            expert = torch.cat([kept[i], torch.zeros(n - prefix, dtype=torch.bool)]).double() * of_prefix[i]
            bonus = switched_on(entropy=o.entropy)
            if o.entropy_mode == "response_only":
                bonus = {name: weight * own.double() for name, weight in bonus.items()}
            weights.append({"policy": own.double() * of_rest[i], "prefix": expert, **bonus})
        return weights

    def kept(self, trajectories: Sequence[Trajectory], entropies: Sequence[Tensor]) -> list[Tensor]:
        """Which prefix tokens are trained, shape (prefix,) for each trajectory: chosen among those of all ranks."""
        rank = self.sampler.rank if self.sampler is not None else 0
        mine = [
            (t.prompt.draw, rank, i, e.tolist()) for i, (t, e) in enumerate(zip(trajectories, entropies, strict=True))
        ]
        parts = self.sampler.gather(mine) if self.sampler is not None else [mine]
        whole = sorted(entry for part in parts for entry in part)
        flags = keep_highest(torch.tensor([x for *_, values in whole for x in values]), self.options.keep_ratio)
        found = zip(whole, flags.split([len(values) for *_, values in whole]), strict=True) if whole else ()
        return [kept for (_, owner, _, _), kept in sorted(found, key=lambda f: f[0][2]) if owner == rank]

    def advantages(self, trajectories: Sequence[Trajectory]) -> tuple[Tensor, Tensor]:
        """Of every trajectory's prefix tokens and of its other tokens, shape (N,) each."""
        if self.options.estimator == "dr_grpo":
            joint = advantages(trajectories, self.options.std)
            return joint, joint
        of_rest = torch.tensor([reward_of(t) for t in trajectories], dtype=torch.float64)
        groups = group_numbers(trajectories)
        plain = torch.tensor([not t.prefix for t in trajectories])
        of_prefix = group_advantages(of_rest, groups, baseline="on-policy", on_policy_N=plain)
        of_rest[plain] = group_advantages(of_rest[plain], groups[plain])
        return of_prefix, of_rest


def prefix_length(fraction: float, tokens: int, least: int) -> int:
    """Tokens of a demonstration's prefix; at least its last token is left to the policy."""
    return max(min(max(int(fraction * tokens), least), tokens - 1), 0)


def keep_highest(entropy_T: Tensor, ratio: float) -> Tensor:
    """True but for the floor((1 - ratio) T) lowest entropies, shape (T,); of equal ones the later is kept."""
    dropped = math.floor((1 - ratio) * len(entropy_T) + 1e-9)  # 1 - 0.9 is a little less than 0.1
    kept_T = torch.ones(len(entropy_T), dtype=torch.bool)
    kept_T[entropy_T.argsort(stable=True)[:dropped]] = False
    return kept_T

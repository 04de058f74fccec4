"""CHORD (arXiv 2508.11408): GRPO and SFT on separate expert prompts in one loss, their mixture on a schedule.

    L = (1 - mu) L_GRPO(own rollouts) + mu L_SFT(expert rows)
    L_GRPO = - (1 / Z) sum_i sum_t min(r A_i, clip(r, 0.8, 1.2) A_i),   A_i = (R_i - mean) / (std + 1e-6)
    L_SFT  = - (1 / Z_sft) sum_t phi_t log pi(y*_t)
    mu_s: linear from 0 to peak in ``warmup`` rollout batches, a cosine from peak to valley in ``decay``, then valley

``chord_mu``: phi = 1, mu from 0.9 to 0.05 in 200 rollout batches. ``chord_phi``: mu = 0.1 throughout and
phi = p (1 - p) with the policy's own p before the optimizer step, no gradient through it; ``token_weight = "p"`` is the
repository's sft_is. The repository's example has peak 0.5, valley 0.02, warmup 200 and decay 400 with phi.

Expert rows are the next prompts with a demonstration, in an order of their own, ``expert_share`` of all rows; they are
in no group. Published: 64 expert rows beside 32 prompts with 8 rollouts, from disjoint data; here both come from the
stage's data. They stand between the groups, so that each optimizer step of a rollout batch has its share of them (the
same in each if there are as many, or a multiple, as prompts).

``normaliser``: ``clean``: all response tokens of the step, as Z and Z_sft. ``code``: ranks x longest response for the
policy and expert tokens for SFT (the repository takes a mean over each micro-batch). ``paper``: Z gives each own
response 1 / (responses x its length), as GRPO is printed, and Z_sft counts expert tokens. The repository's cutoff on p
is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from thence.accounting.work import Outcome, Work
from thence.data.trajectory import Prompt, Trajectory
from thence.methods.base import Method, Sampler, TokenFacts, Weights, in_turn, switched_on
from thence.methods.groups import groups_of
from thence.methods.mixed import (
    ClippedOptions,
    advantages,
    cosine,
    entropy_term,
    likelihood_normaliser,
    policy_normaliser,
)
from thence.objective import Clip, Logp, Normaliser, Term
from thence.settings.limits import Coefficient, Natural, Share


class ChordOptions(ClippedOptions):
    """Settings of CHORD-mu."""

    entropy: Coefficient = 0.0
    """Coefficient of the entropy bonus, a mean over all response tokens."""
    expert_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of expert rows."""
    peak: Share = 0.9
    """Largest mu."""
    valley: Share = 0.05
    """Final mu."""
    warmup: Natural = 0
    """Rollout batches in which mu rises to its peak."""
    decay: Natural = 200
    """Rollout batches in which mu falls to its valley."""


class ChordPhiOptions(ChordOptions):
    """Settings of CHORD-phi."""

    peak: Share = 0.1
    """Largest mu."""
    valley: Share = 0.1
    """Final mu."""
    decay: Natural = 0
    """Rollout batches in which mu falls to its valley."""
    token_weight: Literal["p(1-p)", "p"] = "p(1-p)"
    """phi: the weight of an expert token by its probability p."""


class ChordMu(Method):
    """GRPO with a share of SFT that falls on a schedule."""

    name = "chord_mu"
    stage = "rl"
    demonstrations = "whole"
    formula = "-(1 - mu) (1/N) sum min(r A, clip(r, 0.8, 1.2) A) - mu (1/N) sum_expert log pi, mu from 0.9 to 0.05"
    source = "arXiv 2508.11408 and its code in Trinity-RFT"
    exactness = "exact"
    not_ahead = ""
    Options = ChordOptions
    step = 0
    sampler: Sampler | None = None

    def over_ranks(self, count: int) -> int:
        """The sum of a count over all ranks."""
        return count if self.sampler is None else self.sampler.total(count)

    @property
    def terms(self) -> tuple[Term, ...]:
        o = self.options
        return (
            Term("policy", Clip(o.clip_low, o.clip_high), policy_normaliser(o, Normaliser("sequences"))),
            Term("sft", Logp(), likelihood_normaliser(o, Normaliser("term tokens"))),
            *entropy_term(o),
        )

    def compose(self, sampler: Sampler, prompts: int, n: int) -> list[Trajectory]:
        self.take_up(sampler)
        own = sampler.rollouts(sampler.next_prompts(prompts), n)
        return placed(sampler, groups_of(own), sampler.demonstrations(sampler.expert_prompts(self.experts(prompts, n))))

    def take_up(self, sampler: Sampler) -> None:
        self.step, self.sampler = sampler.step, sampler

    def experts(self, prompts: int, n: int) -> int:
        """How many demonstrations stand beside the rollouts of a batch."""
        share = self.options.expert_share
        return max(1, round(prompts * n * share / (1 - share)))

    def work(self, prompts: int, n: int) -> Work:
        return Work.just(Outcome(prompts * n, prompts * n, self.experts(prompts, n)))

    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Weights]:
        o, weights = self.options, []
        mu = share_of_sft(self.step, o.peak, o.valley, o.warmup, o.decay)
        own = sum(t.origin != "demonstration" for t in trajectories)
        rows = self.over_ranks(len(trajectories)) / max(self.over_ranks(own), 1) if o.normaliser == "paper" else 1.0
        gains = advantages(trajectories, o.std, own_only=True).tolist()
        for i, (trajectory, advantage) in enumerate(zip(trajectories, gains, strict=True)):
            n = len(trajectory.response_ids)
            # the normaliser of "paper" counts expert rows too
            policy = (1 - mu) * advantage * (rows / max(n, 1) if o.normaliser == "paper" else 1.0)
            expert = trajectory.origin == "demonstration"
            sft = mu * self.phi(facts[i] if facts else None, n) if expert else 0.0
            weights.append({"policy": policy, "sft": sft, **switched_on(entropy=o.entropy)})
        return weights

    def phi(self, fact: TokenFacts | None, tokens: int) -> Tensor:
        """Weights of an expert row's tokens, shape (n,)."""
        return torch.ones(tokens, dtype=torch.float64)


class ChordPhi(ChordMu):
    """GRPO with SFT on the tokens that the policy is neither sure of nor far from."""

    name = "chord_phi"
    formula = "-(1 - mu) (1/N) sum min(r A, clip(r, 0.8, 1.2) A) - mu (1/N) sum_expert p (1 - p) log pi, mu = 0.1"
    exactness = "exact"
    uses_facts = True
    Options = ChordPhiOptions

    def phi(self, fact: TokenFacts | None, tokens: int) -> Tensor:
        assert fact is not None, "this method needs the policy's log-probabilities"
        p = fact.logp.double().exp()
        weight = p if self.options.token_weight == "p" else p * (1 - p)
        return weight.clamp(min=sys.float_info.min**0.5)  # p = 0 or 1 after rounding: the token still counts in a mean


def share_of_sft(step: int, peak: float, valley: float, warmup: int, decay: int) -> float:
    """mu after so many rollout batches."""
    if step < warmup:
        return peak * step / warmup
    return cosine(step - warmup, decay, peak, valley) if decay else valley


def placed(sampler: Sampler, groups: Sequence[list[Trajectory]], experts: Sequence[Trajectory]) -> list[Trajectory]:
    """This rank's groups and expert rows, each with its place in the batch of all ranks: see :func:`spread_evenly`.

    Args:
        groups, experts: this rank's share of each, dealt in turn.
    """
    kinds = [[group[0].prompt.index for group in groups], [expert.prompt.index for expert in experts]]
    gathered = sampler.gather(kinds)
    own, shown = (list(enumerate(in_turn([part[kind] for part in gathered]))) for kind in (0, 1))
    marks = [[Trajectory(Prompt(index, (), draw=k), ())] for k, index in own]
    rows = [Trajectory(Prompt(index, (), draw=k), (), origin="demonstration") for k, index in shown]
    result: list[Trajectory] = []
    for place, mark in enumerate(spread_evenly(marks, rows)):
        k, rank = divmod(mark.prompt.draw, sampler.world)
        if rank == sampler.rank:
            mine = [experts[k]] if mark.origin == "demonstration" else groups[k]
            result += [replace(t, prompt=replace(t.prompt, draw=place)) for t in mine]
    return result


def spread_evenly(groups: Sequence[Sequence[Trajectory]], experts: Sequence[Trajectory]) -> list[Trajectory]:
    """Groups with the expert rows between them, evenly.

    An expert row never stands beside rows of the same prompt, if another can stand there: neighbours of one prompt are
    taken for one group when groups are dealt to optimizer steps.
    """
    left, result = list(experts), []
    for g, group in enumerate(groups):
        result += group
        following = groups[g + 1][0].prompt.index if g + 1 < len(groups) else None
        for _ in range((g + 1) * len(experts) // len(groups) - g * len(experts) // len(groups)):
            beside = (result[-1].prompt.index, following)
            chosen = next((i for i, expert in enumerate(left) if expert.prompt.index not in beside), 0)
            result.append(left.pop(chosen))
    return result

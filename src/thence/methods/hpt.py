"""HPT (arXiv 2509.04419): a prompt that the policy can hardly solve is learned from the expert, any other from rewards.

    P = mean score of the prompt's n rollouts, those that nobody can judge left out
    P >  gate:  - (1 / Z_pg)  sum_i sum_t r_it A_i,   A_i = R_i - mean of the group, r unclipped
    P <= gate:  - (coefficient / Z_sft) sum_t log pi(y*_t),   the demonstration takes the place of the n rollouts
    and an entropy bonus over all rows

gate = 0 for Qwen models (the expert where all rollouts failed), 0.25 for Llama-3.1-8B; coefficient 1, and 0.3 for
Qwen2.5-Math-1.5B. A prompt without a demonstration keeps its rollouts.

Normalisers: ``clean``: all tokens of the step. ``code``: Z_pg = ranks x longest response, Z_sft = demonstration tokens
of the step (the release takes that mean for each micro-batch). ``paper``: per prompt, Z_pg = B n L and
Z_sft = B T* with B prompts a step, L the longest and T* the demonstration's length. They are three different
mixtures, so a result has to name its preset.

Settings of the published run that belong to the stage: lr 5e-6, clip_norm 1.0, skip_norm 80, mini_batch 64. One
difference stays: the release cuts a batch into steps of 64 rows a rank, where here the prompts are dealt evenly to
the steps.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence

from thence.accounting.work import Outcome, Work
from thence.data.trajectory import Trajectory
from thence.methods.base import Method, Sampler, TokenFacts, Weights, switched_on
from thence.methods.groups import sampled_groups
from thence.methods.mixed import (
    MixedOptions,
    advantages,
    entropy_term,
    likelihood_normaliser,
    policy_normaliser,
)
from thence.methods.unknown import scores_of
from thence.objective import Logp, Normaliser, Ratio, Term
from thence.objective.surrogates import Surrogate
from thence.settings.limits import Coefficient, PartShare, Rows


class GatedOptions(MixedOptions):
    """Settings of methods that choose between rollouts and demonstration for each prompt."""

    paper_prompts: Rows = 64
    """B of normaliser = "paper": prompts in an optimizer step. It scales both parts alike."""


class HptOptions(GatedOptions):
    """Settings of HPT."""

    gate: PartShare = 0.0
    """The demonstration is trained if the mean score is at most this: 0 for Qwen models, 0.25 for Llama."""
    coefficient: Coefficient = 1.0
    """Coefficient of the likelihood of demonstrations. 0.3 for Qwen2.5-Math-1.5B."""


class Gated(Method):
    """Rollouts or demonstration, prompt by prompt."""

    stage = "rl"
    demonstrations = "whole"
    not_ahead = ""

    @abstractmethod
    def imitates(self, group: Sequence[Trajectory]) -> bool:
        """Whether a prompt with these rollouts is learned from its demonstration; never if no reward is known."""

    def compose(self, sampler: Sampler, prompts: int, n: int) -> list[Trajectory]:
        groups = sampled_groups(sampler, prompts, n)
        chosen = [bool(group[0].prompt.demonstration_ids) and self.imitates(group) for group in groups]
        experts = [group[0].prompt for group, imitated in zip(groups, chosen, strict=True) if imitated]
        demonstrations = iter(sampler.demonstrations(experts) if experts else ())
        kept = [[next(demonstrations)] if imitated else group for group, imitated in zip(groups, chosen, strict=True)]
        return [trajectory for group in kept for trajectory in group]

    def work(self, prompts: int, n: int) -> Work:
        own = prompts * n
        return Work(Outcome(own, 0, prompts), Outcome(own, own), "how many prompts are imitated")

    @property
    def surrogate(self) -> Surrogate:
        """Of the policy term."""
        return Ratio()

    @property
    def terms(self) -> tuple[Term, ...]:
        o = self.options
        policy, sft = self.printed()
        return (
            Term("policy", self.surrogate, policy_normaliser(o, policy)),
            Term("sft", Logp(), likelihood_normaliser(o, sft)),
            *entropy_term(o),
        )

    @abstractmethod
    def printed(self) -> tuple[Normaliser, Normaliser]:
        """Policy and likelihood normaliser of the paper; the rest of its divisors is in :meth:`shares`."""

    @abstractmethod
    def shares(self, group_size: int, tokens: int) -> tuple[float, float]:
        """Factors of the paper's preset on the policy and the likelihood weight of a response of so many tokens."""

    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Weights]:
        o = self.options
        own = Counter(t.prompt.group_key for t in trajectories if t.origin != "demonstration")
        weights = []
        for trajectory, advantage in zip(trajectories, advantages(trajectories, o.std, own_only=True), strict=True):
            n = len(trajectory.response_ids)
            policy, sft = self.shares(own[trajectory.prompt.group_key], n) if o.normaliser == "paper" else (1.0, 1.0)
            if trajectory.origin == "demonstration":
                policy, sft = 0.0, getattr(o, "coefficient", 1.0) * sft
            else:
                policy, sft = float(advantage) * policy, 0.0
            weights.append({"policy": policy, "sft": sft, **switched_on(entropy=o.entropy)})
        return weights


class Hpt(Gated):
    """Rewards where the policy succeeds often enough, the demonstration elsewhere."""

    name = "hpt"
    formula = "-(1/N) [sum r A over prompts with mean score > gate + c sum log pi(y*) over the others], A = R - mean"
    source = "arXiv 2509.04419 and its released code"
    exactness = "exact"
    Options = HptOptions

    def imitates(self, group: Sequence[Trajectory]) -> bool:
        scores = scores_of(group)
        return bool(scores) and sum(scores) / len(scores) <= self.options.gate

    def printed(self) -> tuple[Normaliser, Normaliser]:
        o = self.options
        return Normaliser("one", float(o.paper_prompts * o.code_tokens)), Normaliser("one", float(o.paper_prompts))

    def shares(self, group_size: int, tokens: int) -> tuple[float, float]:
        return 1 / max(group_size, 1), 1 / max(tokens, 1)

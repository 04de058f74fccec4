"""BREAD (arXiv 2506.17211): where all rollouts fail, the group branches from a short prefix of the demonstration.

    L = - (1 / Z) sum_own min(r A_i, clip(r, 0.8, 1.2) A_i) - eta * entropy,   A_i = (R_i - mean) / (std + 1e-6)

A prompt has n rollouts. If none succeeds, its demonstration is cut into ``episodes`` equal parts, and n rollouts go on
from its first k of them; k is found by bisection over 1 ... episodes - 1, towards the shortest prefix from which the
share of successes lies in [``least``, ``most``]: below it the prefix grows, above it shrinks, within it the search
ends.
These n rollouts are then the prompt's group. If no prefix that was tried lies in the band, the group is that of the
shortest one with both successes and failures, and if there is none, the failed rollouts, which teach nothing.

Prefix tokens are context: they have no weight, but count in Z, all response tokens of the step
(``normaliser = "paper"``: Z counts the tokens that the policy wrote). In a budget every rollout of the search counts as
generated, and prefix tokens as trained. A prompt without a demonstration of two tokens keeps its rollouts.

Reconstruction, from the abstract and notes: the band of success, what happens when it is missed, and that the rollouts
of the search serve as the group were chosen here; that the prefix is not trained is likely, but was not confirmed. The
published episodes are steps of reasoning; here they are parts of equal length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from pydantic import Field, model_validator

from thence.accounting.work import Outcome, Work
from thence.data.trajectory import Prompt, Trajectory
from thence.methods.base import Method, Sampler, TokenFacts, Weights, switched_on
from thence.methods.dapo import is_informative
from thence.methods.groups import sampled_groups
from thence.methods.mixed import BEGUN, COUNTED, ClippedOptions, advantages, entropy_term, policy_normaliser
from thence.methods.unknown import all_failed, scores_of
from thence.objective import Clip, Normaliser, Term
from thence.settings.limits import Coefficient, PartShare, SomeShare

Group = list[Trajectory]


class BreadOptions(ClippedOptions):
    """Settings of BREAD."""

    entropy: Coefficient = 0.0
    """Coefficient of the entropy bonus, a mean over all response tokens."""
    episodes: int = Field(default=10, ge=2, le=10**6)
    """Parts of a demonstration."""
    least: SomeShare = 0.25
    """Smallest share of successes that ends the search."""
    most: PartShare = 0.75
    """Largest share of successes that ends the search."""

    @model_validator(mode="after")
    def _band(self) -> BreadOptions:
        if self.least > self.most:
            raise ValueError("least is above most: no share of successes lies between")
        return self


@dataclass
class Search:
    """The search of one prompt's prefix: episodes still possible, and the groups that were tried."""

    prompt: Prompt
    low: int
    high: int
    tried: dict[int, Group] = field(default_factory=dict)
    found: Group | None = None

    @property
    def middle(self) -> int | None:
        """The number of episodes to try next; None where the search is over."""
        return None if self.found is not None or self.low > self.high else (self.low + self.high) // 2

    def learn(self, episodes: int, group: Group, least: float, most: float) -> None:
        """Take in the group that went on from so many episodes."""
        self.tried[episodes] = group
        rate = success_rate(group)
        if rate is None:
            self.high = 0  # nobody can judge these rollouts, so nothing says where to look further
        elif rate < least:
            self.low = episodes + 1
        elif rate > most:
            self.high = episodes - 1
        else:
            self.found = group

    def result(self) -> Group | None:
        """The group to train, if any teaches something."""
        informative = [self.tried[k] for k in sorted(self.tried) if is_informative(self.tried[k])]
        return self.found if self.found is not None else next(iter(informative), None)


class Bread(Method):
    """Clipped policy gradient; hopeless prompts are begun by the expert, as little as it takes."""

    name = "bread"
    stage = "rl"
    demonstrations = "begun"
    single_turn = "an expert begins its responses, and the policy continues within that one turn"
    formula = "-(1/N) sum_own min(r A, clip(r) A), groups that all fail branch from the shortest prefix that helps"
    source = "arXiv 2506.17211, abstract and notes"
    exactness = "reconstruction"
    not_ahead = BEGUN
    Options = BreadOptions

    @property
    def least_rollouts(self) -> int:
        """With one, no share of successes lies in the band, and no branch teaches anything."""
        return 2

    @property
    def terms(self) -> tuple[Term, ...]:
        o = self.options
        policy = Term("policy", Clip(o.clip_low, o.clip_high), policy_normaliser(o, Normaliser("term tokens")))
        return (policy, *entropy_term(o))

    def compose(self, sampler: Sampler, prompts: int, n: int) -> list[Trajectory]:
        groups = sampled_groups(sampler, prompts, n)
        searches = {i: self.search(group) for i, group in enumerate(groups) if all_failed(group)}
        while open_ones := [s for s in searches.values() if s.middle is not None]:
            episodes = [s.middle or 0 for s in open_ones]
            prefixes = [prefix_of(s.prompt, k, self.options.episodes) for s, k in zip(open_ones, episodes, strict=True)]
            branched = sampler.continuations([s.prompt for s in open_ones], prefixes, n)
            for i, (search, k) in enumerate(zip(open_ones, episodes, strict=True)):
                search.learn(k, branched[i * n : i * n + n], self.options.least, self.options.most)
        better: Mapping[int, Group | None] = {i: search.result() for i, search in searches.items()}
        return [trajectory for i, group in enumerate(groups) for trajectory in better.get(i) or group]

    def work(self, prompts: int, n: int) -> Work:
        own, tries = prompts * n, (self.options.episodes - 1).bit_length()
        most = Outcome((1 + tries) * own, own)
        return Work(Outcome(own, own), most, "how many prompts fail, and for how long their prefix is searched")

    def search(self, failed: Group) -> Search:
        """The search for a prompt whose rollouts all failed; over at once where there is nothing to begin with."""
        prompt = failed[0].prompt
        parts = min(self.options.episodes, len(prompt.demonstration_ids or ()))
        return Search(prompt, 1, parts - 1)

    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Weights]:
        o = self.options
        weights = []
        for trajectory, advantage in zip(trajectories, advantages(trajectories, o.std).tolist(), strict=True):
            n = len(trajectory.response_ids)
            own = (torch.arange(n) >= trajectory.prefix).double()
            weights.append({"policy": own * (advantage or COUNTED), **switched_on(entropy=o.entropy)})
        return weights


def success_rate(group: Group) -> float | None:
    """Share of a group's responses that were worth something, among those that somebody can judge; None: none."""
    scores = scores_of(group)
    return sum(score > 0 for score in scores) / len(scores) if scores else None


def prefix_of(prompt: Prompt, episodes: int, of: int) -> tuple[int, ...]:
    """The first episodes of a prompt's demonstration; its last token is always left to the policy."""
    shown = prompt.demonstration_ids or ()
    parts = min(of, len(shown))
    return shown[: min(max(round(episodes / parts * len(shown)), 1), len(shown) - 1)]

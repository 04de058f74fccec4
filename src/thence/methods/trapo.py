"""TRAPO (arXiv 2512.17636): groups sampled in rounds, of which the later are begun by the expert where rewards are low.

    L = - (1 / Z) [ sum over own tokens  r A_i  +  sum over trained prefix tokens  S(pi) ]  - eta * entropy
    S(p) = log p  if p >= alpha,  else  p / alpha - 1 + log alpha          (TrSFT: slope min(1, p / alpha), alpha 0.1)
    A_i = R_i - mean over all eight responses of the prompt

A prompt has eight responses in four micro-groups, sampled one after the other. A micro-group is guided where the mean
reward of all responses before it is below its threshold, and else has plain rollouts:

    micro-group               1     2     3     4
    size (groups)             4     2     1     1
    thresholds, code          -   1/2   2/3     1      sums of rewards below 2 of 4, 4 of 6, 7 of 7
    thresholds, paper         -   0.5   0.7   0.9
    fractions, code           -  0.25   0.5     1
    fractions, paper          -   0.2   0.5     1

A guided response begins with a prefix of the demonstration D (its end token included), and the policy goes on. The
prefix ends behind the first token after h = floor(fraction |D|) that holds a blank line, where that one stands before
(fraction + 0.3) |D|; else it has h tokens. The last token of D is always left to the policy. With the fraction 1 the
response is the demonstration itself, graded like a rollout: its reward is in the mean, and it has no own token.

``r`` is not clipped. A prefix token has weight 1 (``prefix_weight``) whatever the reward. Responses of one micro-group
begin with the same prefix, which is trained once, in the last of them; in the others it has no weight, but counts in Z.

``preset``: ``code`` is the released code's sampling, and Z is LUFFY's 8 ranks times 8192 tokens. ``clean`` is the same
with all response tokens of the step as Z. ``paper`` has the paper's thresholds and fractions, with the clean Z; it is a
reconstruction, since the paper's normaliser, entropy coefficient and mini-batches are not known. Published: lr 5e-6 and
128 prompts (paper), 1e-6 and 8 (script); clip norm 1; no KL; ``entropy`` 0.001 (code).

Rewards are compared with shares, so they should lie in [0, 1]. One that nobody can tell is left out of the mean that
decides; where no reward is known, nothing is guided. A prompt without a demonstration has plain rollouts only. If the
demonstration's own reward is unknown, it is trained, and the mean of the group is over the others.

Other than in the released code: it cuts off what follows ``</think>`` in a demonstration, and micro-group 4 has another
trace of its data set; here a prompt has one demonstration, as it stands in the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from pydantic import model_validator

from thence.accounting.work import Outcome, Work
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import RecipeError
from thence.methods.base import Method, Sampler, TokenFacts, Weights, switched_on
from thence.methods.groups import group_numbers
from thence.methods.mixed import BEGUN, MixedOptions, entropy_term, policy_normaliser
from thence.methods.unknown import scores_of
from thence.objective import Ratio, Term, TrSft, group_advantages
from thence.settings.limits import Coefficient, Rows, Share, SomeShare

BLANK_LINE = "\n\n"
_CODE = {"thresholds": (1 / 2, 2 / 3, 1.0), "fractions": (0.25, 0.5, 1.0)}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "clean": {**_CODE, "normaliser": "clean"},
    "code": {**_CODE, "normaliser": "code"},
    "paper": {"thresholds": (0.5, 0.7, 0.9), "fractions": (0.2, 0.5, 1.0), "normaliser": "paper"},
}
"""Options that a preset sets, where the recipe does not."""


class TrapoOptions(MixedOptions):
    """Settings of TRAPO."""

    preset: Literal["clean", "code", "paper"] = "clean"
    """Sets `thresholds`, `fractions` and `normaliser` where they are not given: see above."""
    groups: tuple[Rows, ...] = (4, 2, 1, 1)
    """Sizes of the micro-groups, in their order; their sum is `rollouts`."""
    thresholds: tuple[Share, ...] = PRESETS["clean"]["thresholds"]
    """Of every micro-group but the first: it is guided where the mean of all rewards before it is below."""
    fractions: tuple[SomeShare, ...] = PRESETS["clean"]["fractions"]
    """Of every micro-group but the first: share of the demonstration that guided responses begin with. 1: the whole."""
    reach: Share = 0.3
    """How far behind its fraction a prefix may end at a blank line, as a share of the demonstration."""
    alpha: SomeShare = 0.1
    """Probability below which the gradient of a prefix token is scaled down."""
    prefix_weight: Coefficient = 1.0
    """Weight of a trained prefix token."""

    @model_validator(mode="before")
    @classmethod
    def _of_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not isinstance(values.get("preset", "clean"), str):
            return values
        return {**PRESETS.get(values.get("preset", "clean"), {}), **values}

    @model_validator(mode="after")
    def _one_of_each(self) -> TrapoOptions:
        later = len(self.groups) - 1
        if later < 0:
            raise ValueError("groups is empty; give the size of each micro-group, such as [4, 2, 1, 1]")
        for name in ("thresholds", "fractions"):
            if len(getattr(self, name)) != later:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} values, and groups has {len(self.groups)} micro-groups; "
                    f"give one for every micro-group but the first: {later}"
                )
        for size, fraction in zip(self.groups[1:], self.fractions, strict=True):
            if fraction == 1 and size > 1:
                raise ValueError(
                    f"fractions has a 1 for a micro-group of {size}, which would be one demonstration {size} times; "
                    "give that micro-group the size 1 in groups, or a fraction below 1"
                )
        return self


class Trapo(Method):
    """Policy gradient on groups that the expert begins where the policy fails, and a bounded likelihood of prefixes."""

    name = "trapo"
    stage = "rl"
    demonstrations = "whole"
    formula = "-(1/Z) [sum_own r A + sum_prefix S(pi)], slope of S min(1, pi/0.1), 4+2+1+1 responses, begun if R is low"
    source = "arXiv 2512.17636 and its repository"
    exactness = "exact"
    not_ahead = BEGUN
    single_turn = "an expert begins its responses, and the policy continues within that one turn"
    Options = TrapoOptions

    @classmethod
    def exactness_with(cls, options: Mapping[str, Any]) -> Literal["exact", "reconstruction"]:
        """``preset = "paper"`` is a reconstruction."""
        return "reconstruction" if options.get("preset") == "paper" else cls.exactness

    @property
    def least_rollouts(self) -> int:
        """A response alone is its own mean."""
        return 2

    @property
    def terms(self) -> tuple[Term, ...]:
        o, normaliser = self.options, policy_normaliser(self.options)
        prefix = Term("prefix", TrSft(o.alpha), normaliser)
        return (Term("policy", Ratio(), normaliser), prefix, *entropy_term(o))

    def prepare(self, rollouts: int, max_tokens: int) -> None:
        super().prepare(rollouts, max_tokens)
        groups = self.options.groups
        if sum(groups) != rollouts:
            raise RecipeError(
                f"trapo's micro-groups have {' + '.join(map(str, groups))} = {sum(groups)} responses, and rollouts is "
                f"{rollouts}",
                remedy=f"set rollouts = {sum(groups)}, or options.groups with the sum {rollouts}; another number of "
                "micro-groups needs options.thresholds and options.fractions too",
                field="rollouts",
            )

    def compared(self, trajectory: Trajectory) -> bool:
        """The demonstration too, where its reward is known."""
        return self.rewarded(trajectory) or trajectory.score is not None

    def compose(self, sampler: Sampler, prompts: int, n: int) -> list[Trajectory]:
        o, asked = self.options, sampler.next_prompts(prompts)
        groups: list[list[Trajectory]] = [[] for _ in asked]
        for number, size in enumerate(o.groups):
            begins: list[tuple[int, ...]] = [()] * len(asked)
            if number:
                threshold, fraction = o.thresholds[number - 1], o.fractions[number - 1]
                begins = [
                    self.prefix(sampler, prompt, fraction) if guided(group, threshold) else ()
                    for prompt, group in zip(asked, groups, strict=True)
                ]
            found = self.sampled(sampler, asked, begins, size, sum(o.groups[:number]))
            for group in groups:
                group += [t.in_round(number) for t in islice(found, size)]
        return [trajectory for group in groups for trajectory in group]

    def work(self, prompts: int, n: int) -> Work:
        o, own = self.options, prompts * n
        ends = [1.0 if fraction == 1 else min(1.0, fraction + o.reach) for fraction in o.fractions]
        begun = prompts * sum(size * end for size, end in zip(o.groups[1:], ends, strict=True))
        least = Outcome(own - begun, own - begun, begun)
        return Work(least, Outcome(own, own), "how many prompts the policy fails, and the expert begins")

    def prefix(self, sampler: Sampler, prompt: Prompt, fraction: float) -> tuple[int, ...]:
        """What a guided response begins with: tokens of the demonstration, at a fraction of 1 all of them."""
        shown = prompt.demonstration_ids or ()
        if not shown or fraction == 1:
            return shown
        return shown[: cut(sampler.token_texts(shown), fraction, self.options.reach)]

    def sampled(
        self, sampler: Sampler, asked: Sequence[Prompt], begins: Sequence[tuple[int, ...]], size: int, first: int
    ) -> Iterator[Trajectory]:
        """One micro-group of every prompt, prompt by prompt; a demonstration counts as a micro-group of its own.

        Args:
            begins: what the responses of each prompt begin with.
            first: number of the first response.
        """
        pairs = list(zip(asked, begins, strict=True))
        shown = [bool(begin) and begin == prompt.demonstration_ids for prompt, begin in pairs]
        plain = [prompt for prompt, begin in pairs if not begin]
        begun = [pair for pair, whole in zip(pairs, shown, strict=True) if pair[1] and not whole]
        ends = [prompt for (prompt, _), whole in zip(pairs, shown, strict=True) if whole]
        own = iter(sampler.rollouts(plain, size, first=first) if plain else [])
        continued = iter(
            sampler.continuations([p for p, _ in begun], [b for _, b in begun], size, first=first) if begun else []
        )
        experts = iter(sampler.demonstrations(ends) if ends else [])
        for (_, begin), whole in zip(pairs, shown, strict=True):
            yield from islice(experts if whole else continued if begin else own, 1 if whole else size)

    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Weights]:
        o, weights = self.options, []
        pairs = zip(trajectories, self.advantages(trajectories), trained_prefixes(trajectories), strict=True)
        for trajectory, advantage, trained in pairs:
            expert = torch.arange(len(trajectory.response_ids)) < expert_tokens(trajectory)
            prefix = o.prefix_weight * expert.double() if trained else 0.0
            weights.append(
                {"policy": (~expert).double() * advantage, "prefix": prefix, **switched_on(entropy=o.entropy)}
            )
        return weights

    def advantages(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """One of every trajectory: its reward less the mean of all known ones of its group; 0 where it is unknown."""
        known = torch.tensor([t.score is not None for t in trajectories], dtype=torch.bool)
        found = torch.zeros(len(trajectories), dtype=torch.float64)
        if known.any():
            rewards = torch.tensor(scores_of(trajectories), dtype=torch.float64)
            found[known] = group_advantages(rewards, group_numbers(trajectories)[known], std=self.options.std)
        return found.tolist()


def guided(before: Sequence[Trajectory], threshold: float) -> bool:
    """Whether the mean of the known rewards is below a threshold; never where none is known."""
    scores = scores_of(before)
    return bool(scores) and sum(scores) / len(scores) < threshold


def cut(texts: Sequence[str], fraction: float, reach: float) -> int:
    """Tokens of a demonstration's prefix, given the text of each of its tokens; the last is left to the policy.

    The prefix ends behind the first token after ``h = floor(fraction * tokens)`` that holds a blank line, if that token
    stands before ``(fraction + reach) * tokens``; else it has h tokens.
    """
    tokens = len(texts)
    least = int(fraction * tokens)
    broken = next((i for i in range(least + 1, tokens) if BLANK_LINE in texts[i]), tokens)
    found = broken + 1 if broken < tokens and broken < tokens * (fraction + reach) else least
    return max(min(found, tokens - 1), 0)


def expert_tokens(trajectory: Trajectory) -> int:
    """First tokens of the response that the expert wrote."""
    return len(trajectory.response_ids) if trajectory.origin == "demonstration" else trajectory.prefix


def trained_prefixes(trajectories: Sequence[Trajectory]) -> list[bool]:
    """Whether each trajectory's prefix is trained: it is the last of its prompt's micro-group, and has one."""
    last = {(t.prompt.group_key, t.round): i for i, t in enumerate(trajectories) if expert_tokens(t)}
    chosen = set(last.values())
    return [i in chosen for i in range(len(trajectories))]

"""What methods that mix own and expert tokens share: normaliser presets, the entropy bonus, joint group advantages.

The published codes divide policy terms by (ranks x longest response) and likelihood terms by their own token count, so
their mixture depends on lengths, counts and packing. ``clean`` gives every token of the step one normaliser, so that a
method's coefficients alone set the mixture; ``code`` is what the released trainers compute, micro-batch factors apart
(taken as one); ``paper`` is the printed formula, where it says something else.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from thence.accounting.work import Outcome, Work
from thence.data.trajectory import Trajectory
from thence.methods.base import Method, Options, Sampler, reward_of
from thence.methods.groups import group_numbers
from thence.objective import Entropy, Normaliser, Term, group_advantages
from thence.settings.limits import Coefficient, Processes, Tokens

BEGUN = (
    "the sampler keeps no log-probabilities of a response that the expert began, so that its tokens could not be "
    "weighed by the policy that sampled them"
)
"""Why methods whose responses an expert begins cannot be trained with ``rl.ahead``."""
COUNTED = sys.float_info.min
"""Weight of a token without advantage: it counts as one of its term's, and vanishes when divided or rounded."""


class MixedOptions(Options):
    """Settings of every method that mixes own and expert tokens."""

    normaliser: Literal["clean", "code", "paper"] = "clean"
    """clean: all terms over all response tokens of the step. code: policy terms over `code_ranks` x `code_tokens`,
    likelihood terms over their own tokens. paper: the printed formula of the method."""
    code_tokens: Tokens = 8192
    """Longest response in the released trainers' divisor."""
    code_ranks: Processes = 8
    """Ranks in the released trainers' divisor."""
    entropy: Coefficient = 0.001
    """Coefficient of the entropy bonus, a mean over all response tokens."""
    std: bool = False
    """Divide advantages by the group's standard deviation."""


class ClippedOptions(MixedOptions):
    """Settings of every such method whose policy term is the original GRPO's."""

    std: bool = True
    """Divide advantages by the group's standard deviation."""
    clip_low: Coefficient = 0.2
    """Clip range of the ratio below one."""
    clip_high: Coefficient = 0.2
    """Clip range of the ratio above one."""


def policy_normaliser(options: MixedOptions, paper: Normaliser | None = None) -> Normaliser:
    """Of terms with an advantage. ``paper``: what the method's paper prints, if not the clean one."""
    if options.normaliser == "code":
        return Normaliser("one", float(options.code_ranks * options.code_tokens))
    return paper if options.normaliser == "paper" and paper is not None else Normaliser("tokens")


def likelihood_normaliser(options: MixedOptions, paper: Normaliser | None = None) -> Normaliser:
    """Of likelihood terms."""
    if options.normaliser == "code":
        return Normaliser("term tokens")
    return paper if options.normaliser == "paper" and paper is not None else Normaliser("tokens")


def entropy_term(options: MixedOptions) -> tuple[Term, ...]:
    """The entropy bonus as the last term, if it is on."""
    return (Term("entropy", Entropy(), Normaliser("tokens")),) if options.entropy else ()


def cosine(step: int, steps: int, first: float, last: float) -> float:
    """A schedule from ``first`` at step 0 to ``last`` at ``steps`` and after."""
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * min(step, steps) / steps))


def advantages(trajectories: Sequence[Trajectory], std: bool, *, own_only: bool = False) -> Tensor:
    """One advantage a trajectory, shape (N,), float64; the trajectories of one prompt are a group.

    Args:
        own_only: demonstrations neither count in their group's mean nor get an advantage.

    Raises:
        ValueError: a reward that counts is not known.
    """
    own = [not own_only or t.origin != "demonstration" for t in trajectories]
    values = [reward_of(t) if o else 0.0 for t, o in zip(trajectories, own, strict=True)]
    rewards = torch.tensor(values, dtype=torch.float64)
    groups = group_numbers(trajectories)
    if not own_only:
        return group_advantages(rewards, groups, std=std)
    result = torch.zeros(len(trajectories), dtype=torch.float64)
    if any(own):
        result[own] = group_advantages(rewards[own], groups[own], std=std)
    return result


class WithDemonstration(Method):
    """Groups of ``n - 1`` rollouts and the prompt's demonstration, or of ``n`` rollouts where there is none.

    Attributes:
        sampler: of the last batch; None before the first.
    """

    stage = "rl"
    demonstrations = "whole"
    not_ahead = ""
    sampler: Sampler | None = None

    @property
    def least_rollouts(self) -> int:
        """One beside the demonstration."""
        return 2

    def work(self, prompts: int, n: int) -> Work:
        return Work.just(Outcome(prompts * (n - 1), prompts * (n - 1), prompts))

    def take_up(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def compose(self, sampler: Sampler, prompts: int, n: int) -> list[Trajectory]:
        self.take_up(sampler)
        asked = sampler.next_prompts(prompts)
        with_one = [prompt for prompt in asked if prompt.demonstration_ids]
        without = [prompt for prompt in asked if not prompt.demonstration_ids]
        own = iter(sampler.rollouts(with_one, n - 1) if with_one else [])
        other = iter(sampler.rollouts(without, n) if without else [])
        experts = iter(sampler.demonstrations(with_one) if with_one else [])
        found: list[Trajectory] = []
        for prompt in asked:
            found += [*islice(own, n - 1), next(experts)] if prompt.demonstration_ids else islice(other, n)
        return found

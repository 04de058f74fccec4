"""What methods that mix own and expert tokens share: normaliser presets, the entropy bonus, joint group advantages.

The published codes divide policy terms by (ranks x longest response) and likelihood terms by their own token count, so
their mixture depends on lengths, counts and packing. ``clean`` gives every token of the step one normaliser, so that a
method's coefficients alone set the mixture; ``code`` is what the released trainers compute, micro-batch factors apart
(taken as one); ``paper`` is the printed formula, where it says something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from thence.data.trajectory import Prompt, Trajectory
from thence.errors import RecipeError
from thence.methods.base import Options, Sampler, reward_of
from thence.methods.groups import group_numbers
from thence.objective import Entropy, Normaliser, Term, group_advantages
from thence.settings.limits import Coefficient, Processes, Tokens


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


def groups_with_demonstration(sampler: Sampler, prompts: Sequence[Prompt], n: int) -> list[Trajectory]:
    """``n`` trajectories for each prompt: ``n - 1`` rollouts and its demonstration, or ``n`` rollouts if it has none.

    Raises:
        RecipeError: groups of one have no room for both.
    """
    if n < 2:
        raise RecipeError(
            "a group of one has no room for a rollout beside the demonstration",
            remedy="set rollouts to 2 or more",
            field="rl.rollouts",
        )
    with_one = [prompt for prompt in prompts if prompt.demonstration_ids]
    without = [prompt for prompt in prompts if not prompt.demonstration_ids]
    own = iter(sampler.rollouts(with_one, n - 1) if with_one else [])
    other = iter(sampler.rollouts(without, n) if without else [])
    experts = iter(sampler.demonstrations(with_one) if with_one else [])
    result: list[Trajectory] = []
    for prompt in prompts:
        if prompt.demonstration_ids:
            result += [*(next(own) for _ in range(n - 1)), next(experts)]
        else:
            result += [next(other) for _ in range(n)]
    return result

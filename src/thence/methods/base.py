"""What a method is: what to sample and attach, and the weight that every token gets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from thence.data.trajectory import Prompt, Trajectory
from thence.errors import RecipeError
from thence.objective import Row, Term, trained_tokens
from thence.settings.section import Section
from thence.settings.validation import validated

T = TypeVar("T")


class Options(Section):
    """Settings of a method: immutable, and an unknown key is an error."""


class Sampler(Protocol):
    """What a method composes its batch with.

    Attributes:
        step: rollout batches before this one.
        steps: rollout batches of the stage.
        rank, world: this process among those that share the batch. Each composes its share of one batch: prompts are
            dealt in turn, so that 1, 2 or 4 ranks have the same batch. What a method decides must be the same on all.
    """

    step: int
    steps: int
    rank: int
    world: int

    def next_prompts(self, count: int) -> list[Prompt]:
        """This rank's share of the next ``count`` prompts in the data's order: every ``world``-th from ``rank`` on."""
        ...

    def rollouts(self, prompts: Sequence[Prompt], n: int) -> list[Trajectory]:
        """``n`` graded responses of the policy for each prompt, prompt by prompt.

        Those that nobody can judge are among them, with ``score = None``: see :mod:`thence.methods.unknown`.
        """
        ...

    def continuations(self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]], n: int) -> list[Trajectory]:
        """``n`` graded responses for each prompt that begin with the given tokens and are finished by the policy."""
        ...

    def demonstrations(self, prompts: Sequence[Prompt]) -> list[Trajectory]:
        """The expert's responses, graded like the policy's. Every prompt must have one."""
        ...

    def expert_prompts(self, count: int) -> list[Prompt]:
        """This rank's share of the next ``count`` prompts with a demonstration, in an order of their own."""
        ...

    def uniform(self, *key: object) -> float:
        """A number in [0, 1) that follows from the recipe's seed, the stage, the step and the key alone."""
        ...

    def total(self, count: int) -> int:
        """The sum of a count over all ranks."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """A plain value of every rank, in rank order, on every rank. All ranks must ask."""
        ...


@dataclass(frozen=True)
class TokenFacts:
    """What the policy as it stands says of a trajectory's response tokens; no gradient.

    Args:
        logp: log-probabilities, shape (n,), nats.
        entropy: of the distributions that the tokens were drawn from, shape (n,), nats.
    """

    logp: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class SideStep:
    """An optimizer step of a second kind, with its own optimizer state.

    Args:
        name: of the kind; the optimizer belongs to it.
        terms, trajectories, weights: as of a batch.
        lr: learning rate; None: the stage's.
        clip_norm: largest gradient norm; None: the stage's.
    """

    name: str
    terms: tuple[Term, ...]
    trajectories: Sequence[Trajectory]
    weights: Sequence[Tensor]
    lr: float | None = None
    clip_norm: float | None = None


class Method(ABC):
    """A rule that gives every token a list of (surrogate, weight) terms.

    Third parties register a subclass under the entry point group ``thence.methods``.
    """

    name: ClassVar[str]
    stage: ClassVar[Literal["sft", "rl"]]
    formula: ClassVar[str]
    """The loss in one line."""
    source: ClassVar[str]
    """Where the formula stands."""
    exactness: ClassVar[Literal["exact", "reconstruction"]] = "exact"
    """reconstruction: parts of it are not public, and what stands for them was chosen here."""
    demonstrations: ClassVar[Literal["no", "whole", "begun"]] = "no"
    """Whether it trains on demonstrations in an RL stage: whole ones, or responses that begin with a part of one."""
    uses_facts: ClassVar[bool] = False
    """Whether :meth:`weigh` looks at the policy's own log-probabilities and entropies."""
    Options: ClassVar[type[Options]] = Options

    def __init__(self, options: Mapping[str, Any] | None = None):
        remedy = f"see `thence methods {self.name}` (method {self.name})"
        self.options: Any = validated(self.Options, dict(options or {}), "options", remedy=remedy)

    @property
    def least_rollouts(self) -> int:
        """The fewest rollouts of a prompt with which it can learn anything; default: 1."""
        return 1

    def prepare(self, rollouts: int, max_tokens: int) -> None:
        """Told the stage's settings, once, before anything is sampled.

        Args:
            rollouts: n of :meth:`compose`.
            max_tokens: the longest response.

        Raises:
            RecipeError: it cannot learn with them. ``field`` is as seen from the stage's table.
        """
        if rollouts < self.least_rollouts:
            raise RecipeError(
                f"{self.name} learns nothing from {rollouts} rollout of a prompt",
                remedy=f"set rollouts to {self.least_rollouts} or more; 8 is usual",
                field="rollouts",
            )

    def rewarded(self, trajectory: Trajectory) -> bool:
        """Whether the method needs this trajectory's reward. Default: all but demonstrations.

        One that it needs and nobody can tell is left out of the step.
        """
        return trajectory.origin != "demonstration"

    def compared(self, trajectory: Trajectory) -> bool:
        """Whether this trajectory's reward is part of its group's baseline. Default: if the reward is needed."""
        return self.rewarded(trajectory)

    @property
    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """The terms of every batch."""

    @abstractmethod
    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Tensor]:
        """The weights of every trajectory's response tokens, shape (J, n) each, for whole groups at a time.

        Args:
            trajectories: those of one optimizer step.
            facts: of the policy before that step, one a trajectory, if the method ``uses_facts``.
        """

    def compose(self, sampler: Sampler, prompts: int, n: int) -> list[Trajectory]:
        """This rank's trajectories of one rollout batch, whole groups; default: ``n`` rollouts for each prompt.

        Args:
            prompts: of the whole batch, over all ranks.
            n: size of a group.
        """
        return sampler.rollouts(sampler.next_prompts(prompts), n)

    def side_steps(self, sampler: Sampler) -> list[SideStep]:
        """Optimizer steps of another kind that follow the update on this rollout batch; default: none."""
        return []

    def took_step(self, kind: str, grad_norm: float) -> None:  # noqa: B027 - most methods do not look at it
        """Told after every optimizer step: ``main`` or a side step's name, and the gradient norm before clipping."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values. If all ranks have the same, another number of them can resume."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - a method without state has nothing to take up
        """Take up a state that :meth:`state` gave."""


def in_turn(parts: Sequence[Sequence[T]]) -> list[T]:
    """What was dealt to ranks in turn, in the order before it was dealt."""
    longest = max(map(len, parts), default=0)
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


def group_numbers(trajectories: Sequence[Trajectory]) -> Tensor:
    """The group of each trajectory, shape (N,), integers: those of one draw of a prompt share it."""
    numbers: dict[tuple[int, int], int] = {}
    return torch.tensor([numbers.setdefault(t.prompt.group_key, len(numbers)) for t in trajectories], dtype=torch.int64)


def reward_of(trajectory: Trajectory) -> float:
    """The reward of a trajectory that is given an advantage.

    Raises:
        ValueError: nobody knows it; such a trajectory is left out before weights are given.
    """
    if trajectory.score is None:
        raise ValueError(f"a response to prompt {trajectory.prompt.index} has no reward; leave it out, or grade it")
    return trajectory.score


def make_rows(trajectories: Sequence[Trajectory], weights: Sequence[Tensor], train_on: str = "response") -> list[Row]:
    """Trajectories and their weights as rows of a batch."""
    rows = []
    for trajectory, weight in zip(trajectories, weights, strict=True):
        ids = torch.tensor([*trajectory.prompt.token_ids, *trajectory.response_ids], dtype=torch.int64)
        trained = trained_tokens(len(trajectory.prompt.token_ids), len(ids), train_on)
        behaviour = None if trajectory.behaviour is None else torch.tensor(trajectory.behaviour)
        rows.append(Row(ids, trained, weight, behaviour))
    return rows

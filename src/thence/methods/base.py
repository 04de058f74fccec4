"""What a method is: what to sample and attach, and the weight that every token gets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from thence.data.trajectory import Prompt, Trajectory
from thence.objective import Row, Term, trained_tokens


class Options(BaseModel):
    """Settings of a method: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Sampler(Protocol):
    """What a method composes its batch with."""

    def next_prompts(self, count: int) -> list[Prompt]:
        """The next prompts in the data's order."""
        ...

    def rollouts(self, prompts: Sequence[Prompt], n: int) -> list[Trajectory]:
        """``n`` graded responses of the policy for each prompt, prompt by prompt."""
        ...


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
    Options: ClassVar[type[Options]] = Options

    def __init__(self, options: Mapping[str, Any] | None = None):
        self.options: Any = self.Options.model_validate(dict(options or {}))

    @property
    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """The terms of every batch."""

    @abstractmethod
    def weigh(self, trajectories: Sequence[Trajectory]) -> list[Tensor]:
        """The weights of every trajectory's response tokens, shape (J, n) each, for whole groups at a time."""

    def compose(self, sampler: Sampler, prompts: int, n: int) -> list[Trajectory]:
        """The trajectories of one rollout batch, whole groups; default: ``n`` rollouts for each prompt."""
        return sampler.rollouts(sampler.next_prompts(prompts), n)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - a method without state has nothing to take up
        """Take up a state that :meth:`state` gave."""


def make_rows(trajectories: Sequence[Trajectory], weights: Sequence[Tensor], train_on: str = "response") -> list[Row]:
    """Trajectories and their weights as rows of a batch."""
    rows = []
    for trajectory, weight in zip(trajectories, weights, strict=True):
        ids = torch.tensor([*trajectory.prompt.token_ids, *trajectory.response_ids], dtype=torch.int64)
        rows.append(Row(ids, trained_tokens(len(trajectory.prompt.token_ids), len(ids), train_on), weight))
    return rows

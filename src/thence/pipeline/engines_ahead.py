"""Engines that sample ahead: they get weights in two parts, copied by the trainer and loaded when their turn comes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from thence.pipeline.context import StageContext
from thence.rollout.child import SamplingChild
from thence.rollout.native import Response, Sampling
from thence.train.lora import places_of
from thence.train.parallel import together
from thence.train.policy import Policy
from thence.train.weights import named_weights


class EngineAhead(Protocol):
    """An engine that is asked by one thread, and given weights by another."""

    def prepare(self, version: int) -> Any:
        """Copy the weights as they stand. All ranks call it."""
        ...

    def take(self, handed: Any) -> None:
        """Load a copy, in the thread that asks for responses."""
        ...

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling) -> list[Response]:
        """One response for every prompt."""
        ...

    def close(self) -> None:
        """End it, also while another thread asks."""
        ...


@dataclass(frozen=True)
class WithWeights:
    """An engine that a batch is sampled with.

    Args:
        load: gives it the batch's weights.
    """

    engine: EngineAhead
    load: Callable[[], None]

    def update(self, version: int) -> None:
        """The weights are those that were copied for the batch, whatever the trainer has now."""
        self.load()

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        limits: Sequence[int] | None = None,
    ) -> list[Response]:
        if limits is not None:
            raise ValueError("rollouts of several turns are not sampled ahead")
        return self.engine.sample(prompts, seeds, sampling)


@contextmanager
def sampling_child(context: StageContext, threads: int | None) -> Iterator[SamplingChild]:
    """A process that samples from the stage's model. All ranks make one.

    Raises:
        UserError: it does not start, here or on another rank.
    """
    policy, made = context.policy, list[SamplingChild]()
    plain = policy.model if policy.skeleton is None else policy.skeleton
    dtype = next(plain.parameters()).dtype
    model = {
        "config": json.loads(plain.config.to_json_string(use_diff=False)),
        "class": type(plain).__name__,
        "attention": plain.config._attn_implementation,
        "dtype": str(dtype).removeprefix("torch."),
    }

    def start() -> None:
        size = context.n_parameters * dtype.itemsize
        made.append(SamplingChild(lambda: handed_tensors(policy), size, model, str(context.device), threads))

    try:
        together(context.ranks, start)
        yield made[0]
    finally:
        for child in made:
            child.close()


def handed_tensors(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers as the plain model has them, one at a time. All ranks iterate to the end."""
    told = set()
    for name, value in named_weights(policy):
        told.add(name)
        yield name, value
    places = places_of(policy.model)
    for name, value in policy.model.named_buffers():
        if (plain := places.plain(name)) is not None and plain not in told:
            yield plain, value

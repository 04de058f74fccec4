"""Engines that sample ahead: they get weights in two parts, copied by the trainer and loaded when their turn comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from thence.pipeline.context import StageContext
from thence.rollout.child import SamplingChild
from thence.rollout.native import Response, Sampling
from thence.rollout.vllm.engine import VllmEngine
from thence.train.model import save_model
from thence.train.policy import Policy
from thence.train.weights import named_weights, whole


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
class VllmAhead:
    """vLLM with the policy's weights as they stand when they are copied."""

    engine: VllmEngine
    policy: Policy

    def prepare(self, version: int) -> Any:
        with whole(self.policy) as model:
            return self.engine.prepare(model, version)

    def take(self, handed: Any) -> None:
        self.engine.take(handed)

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling) -> list[Response]:
        return self.engine.sample(prompts, seeds, sampling)

    def close(self) -> None:
        self.engine.close()


@dataclass(frozen=True)
class WithWeights:
    """An engine that a batch is sampled with.

    Args:
        load: gives it the batch's weights.
    """

    engine: EngineAhead
    load: Callable[[], None]

    def push_weights(self, model: Any, version: int) -> None:
        """The weights are those that were copied for the batch, whatever the trainer has now."""
        self.load()

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling) -> list[Response]:
        return self.engine.sample(prompts, seeds, sampling)


def sampling_child(context: StageContext, threads: int | None) -> SamplingChild:
    """A process that samples from the stage's model as it stands. All ranks make one.

    Raises:
        UserError: it does not start.
    """

    def save(folder: Path) -> None:
        with whole(context.policy) as model:
            save_model(model, context.tokenizer, folder)

    model = context.recipe.model
    settings = {"compute_dtype": model.compute_dtype, "trust_remote_code": model.trust_remote_code}
    return SamplingChild(save, lambda: named_weights(context.policy), settings, str(context.device), threads)

"""Rollout batches that are composed while earlier ones are trained (``rl.ahead``).

With ``ahead = k``, batch t is sampled from the weights after step t - k, the first k batches from those that the stage
begins with. Before step t is taken, all batches up to t + k that are not ordered yet are ordered, with a copy of the
weights as they stand; then batch t is waited for. One thread composes the batches in their order, by an object of the
method of its own: it asks a process for responses and grades them. Nothing of a batch is shared with the step in
progress: it has its own sampler, position in the data, FLOP meter and ranks.

A checkpoint holds the batches that are due (:mod:`thence.pipeline.due`). So a run that was killed resumes with the same
responses. Batches that are never trained are counted as waste.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from thence.accounting.flops import rule_flops
from thence.cores import beside
from thence.data.trajectory import Trajectory
from thence.errors import RecipeError
from thence.methods.ahead import why_not_ahead
from thence.methods.base import Method
from thence.pipeline.context import StageContext
from thence.pipeline.due import DueBatch, packed, unpacked
from thence.pipeline.engines_ahead import EngineAhead, WithWeights
from thence.pipeline.rollout_places import chunks_ahead, shared_ahead
from thence.pipeline.sampler import RolloutSampler
from thence.recipe import Rl

log = logging.getLogger(__name__)
LOOK_SECONDS = 0.5
END_SECONDS = 30.0  # for a thread that was told to end; it may be grading


@dataclass(frozen=True)
class Order:
    """A batch that is to be composed.

    Args:
        step: that trains it, counted from 0.
        version: of the weights.
        steps: that the stage is expected to have.
        handed: the copy of the weights.
        context: the stage as the thread sees it.
    """

    step: int
    version: int
    steps: int
    handed: Any
    context: StageContext


class Ahead:
    """The batches of a stage, composed by a thread of this process. A context manager. All ranks make one.

    Args:
        sampler: as the stage begins; every batch gets a copy. Its position in the data is that of the last batch that
            is composed, whenever :meth:`state` has been asked for.
        composer: an object of the method that composes alone, and is never asked for weights.
        engine: holds the weights that responses are sampled from.
    """

    def __init__(
        self, context: StageContext, stage: Rl, sampler: RolloutSampler, composer: Method, engine: EngineAhead
    ):
        self.context, self.stage, self.sampler, self.composer, self.engine = context, stage, sampler, composer, engine
        self._apart = context.ranks.apart()
        self._ordered = 0  # batches, from the first of the stage on
        self._orders: deque[Order] = deque()
        self._due: dict[int, DueBatch] = {}
        self._position = (0, 0)
        self._loaded: Any = None
        self._waited = 0.0  # seconds, by the checkpoint before a step
        self._failed: BaseException | None = None
        self._busy = self._ending = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._compose_all, name="thence-ahead", daemon=True)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, done: int, tensors: Mapping[str, Tensor]) -> None:
        """Start after so many steps, with the batches that a checkpoint holds (:meth:`state`; empty: none)."""
        kept = unpacked(tensors, self.sampler, self.context.ranks)
        self._due = {batch.step: batch for batch in kept}
        self._ordered = done + len(kept)
        self._position = (self.sampler.drawn, self.sampler.expert_drawn)
        self._thread.start()

    def take(self, step: int) -> DueBatch:
        """The batch of a step, counted from 0, once it is composed.

        What is sampled from the weights that the policy has before this step is ordered first.

        Raises:
            Exception: what failed in composing this batch or a later one.
        """
        last = min(step + self.stage.ahead, self.stage.steps - 1)
        if self._ordered <= last:
            handed, steps = self.engine.prepare(step), self.sampler.steps
            orders = [
                Order(due, step, steps, handed, replace(self.context, ranks=self._apart))
                for due in range(self._ordered, last + 1)
            ]
            with self._changed:
                self._orders.extend(orders)
                self._ordered = last + 1
                self._changed.notify_all()
        start = time.perf_counter()
        self._wait(lambda: step in self._due)
        batch = self._due.pop(step)
        batch.sampler.context = self.context  # what the optimizer steps ask of it is asked of their ranks
        waited, before = time.perf_counter() - start, self._waited
        self._waited = 0.0
        return replace(batch, waited=waited, waited_before=before)

    def state(self, done: int) -> dict[str, Tensor]:
        """What a checkpoint after so many steps holds. Waits for the batches that are ordered. All ranks call it."""
        start = time.perf_counter()
        due = self._all_due(done)
        self._waited += time.perf_counter() - start
        self.sampler.drawn, self.sampler.expert_drawn = self._position
        return packed(due, self.context.ranks)

    def waste(self, done: int) -> dict[str, float]:
        """What was sampled and is not trained, over all ranks, where the stage ends after so many steps; empty:
        nothing. Waits for the batches that are ordered, so that it is the same whenever the run was killed."""
        due = self._all_due(done)
        if not due:
            return {}
        own = sum(trajectory.sampled_tokens for batch in due for trajectory in batch.sampler.seen)
        tokens = self.context.ranks.sum_counts([own])[0]
        flops = rule_flops(self.context.n_parameters, 0, tokens, 0)
        return {"wasted_batches": len(due), "wasted_tokens": tokens, "wasted_flops": flops}

    def close(self) -> None:
        """End the thread. One that is composing is interrupted: its engine is ended."""
        with self._changed:
            self._ending = True
            busy = self._busy or bool(self._orders)
            self._changed.notify_all()
        if busy:
            self.engine.close()
        if self._thread.is_alive():
            self._thread.join(END_SECONDS)
        if self._thread.is_alive():
            log.warning("%s: a thread that grades responses has not ended, and is left alone", self.context.name)

    def _all_due(self, done: int) -> list[DueBatch]:
        wanted = range(done, self._ordered)
        self._wait(lambda: all(step in self._due for step in wanted))
        return [self._due[step] for step in wanted]

    def _wait(self, ready: Callable[[], bool]) -> None:
        with self._changed:
            while not ready():
                if self._failed is not None:
                    raise self._failed
                self._changed.wait(LOOK_SECONDS)

    # In the thread.

    def _compose_all(self) -> None:
        try:
            while (order := self._next()) is not None:
                batch = self._composed(order)
                with self._changed:
                    self._due[order.step] = batch
                    self._busy = False
                    self._changed.notify_all()
        except BaseException as error:  # raised where the batch is waited for
            with self._changed:
                self._failed, self._busy = error, False
                self._changed.notify_all()

    def _next(self) -> Order | None:
        with self._changed:
            while not (self._orders or self._ending):
                self._changed.wait()
            if self._ending:
                return None
            self._busy = True
            return self._orders.popleft()

    def _composed(self, order: Order) -> DueBatch:
        sampler = copy.copy(self.sampler)
        sampler.context, sampler.steps = order.context, order.steps
        sampler.drawn, sampler.expert_drawn = self._position
        sampler.engine = WithWeights(self.engine, lambda: self._load(order.handed))
        sampler.begin(order.step, None)
        made = self.composer.compose(sampler, self.stage.prompts, self.stage.rollouts)
        sampler.engine, sampler.seen = None, _stamped(sampler.seen, order.version)
        self._position = (sampler.drawn, sampler.expert_drawn)
        flops = order.context.meter.total
        return DueBatch(order.step, order.version, sampler, _stamped(made, order.version), self._position, flops)

    def _load(self, handed: Any) -> None:
        if self._loaded is not handed:
            self.engine.take(handed)
            self._loaded = handed


def _stamped(trajectories: list[Trajectory], version: int) -> list[Trajectory]:
    return [replace(t, version=version) if t.origin == "rollout" else t for t in trajectories]


@contextmanager
def sharing_cores(context: StageContext, stage: Rl) -> Iterator[int | None]:
    """While a process samples on the same cores, torch has its share of the threads here. Gives those of the process;
    None: as torch chooses."""
    if not stage.ahead or context.device.type != "cpu":
        yield None
        return
    import os

    before = torch.get_num_threads()
    own, theirs = beside(os.environ, before)
    torch.set_num_threads(own)
    try:
        yield theirs
    finally:
        torch.set_num_threads(before)


def check_ahead(name: str, stage: Rl, method: Method, trusts_code: bool = False) -> None:
    """Refuse to compose batches ahead where that would change what the method does, or cannot be done.

    Args:
        trusts_code: the model may have code of its own (``model.trust_remote_code``).

    Raises:
        RecipeError: it is refused.
    """
    if not stage.ahead:
        return
    why = why_not_ahead(type(method))
    if why is not None:
        raise RecipeError(
            f"{stage.method} cannot sample ahead: {why}",
            remedy="set ahead = 0, or take another method: docs/asynchronous.md lists those that can",
            field=f"{name}.ahead",
        )
    if stage.engine == "native" and trusts_code:
        raise RecipeError(
            "a model with Python code of its own cannot be built a second time in the process that samples",
            remedy="set ahead = 0",
            field=f"{name}.ahead",
        )
    if stage.engine == "vllm" and stage.vllm.get("ranks_per_engine", 1) != 1:
        raise shared_ahead(f"{name}.ahead")
    if stage.engine == "vllm" and stage.vllm.get("transfer", "files") != "files":
        raise chunks_ahead(f"{name}.vllm.transfer")
    if stage.environment is not None:
        raise RecipeError(
            "rollouts of several turns are not sampled ahead: a checkpoint of due batches does not hold what an "
            "environment said",
            remedy="set ahead = 0, or leave the environment out",
            field=f"{name}.ahead",
        )
    if stage.fault is not None:
        raise RecipeError(
            "a fault is a change of the step on responses of the newest policy, and these are sampled ahead",
            remedy="set ahead = 0, or leave the fault out",
            field=f"{name}.ahead",
        )

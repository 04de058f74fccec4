"""Faults around the step: gradients that stay, never come, or are scaled; steps not taken; labels that are shifted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from thence.faults.cut import CutPlan, Window
from thence.objective import Row, local_counts
from thence.train.parallel import Ranks
from thence.train.parallel.ranks import local_norm
from thence.train.policy import Policy
from thence.train.step import Observer, StepReport, StepSettings, accumulate_gradients


@dataclass(frozen=True)
class Call:
    """The arguments of one step."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    window: Window
    ranks: Ranks
    settings: StepSettings
    observe: Observer | None


Proceed = Callable[[Call], StepReport]
Link = Callable[[Call, Proceed], StepReport]
"""Does something before and after the rest of the step; may keep a state from step to step."""


class OptimizerInFront:
    """An optimizer of which the faults below leave something undone."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, clears: bool = True, steps: bool = True):
        self._optimizer, self._clears, self._steps = optimizer, clears, steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self._clears:
            self._optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure) if self._steps else None


def _in_front(call: Call, **undone: bool) -> Call:
    return replace(call, optimizer=cast(torch.optim.Optimizer, OptimizerInFront(call.optimizer, **undone)))


def leak(plan: CutPlan) -> Link:
    """Before every second step the gradient of the one before is not cleared."""
    taken = 0

    def link(call: Call, proceed: Proceed) -> StepReport:
        nonlocal taken
        taken += 1
        return proceed(_in_front(call, clears=taken % 2 == 1))

    return link


def no_step(plan: CutPlan) -> Link:
    """A window with fewer micro-batches than planned goes forward and backward, and no step is taken."""

    def link(call: Call, proceed: Proceed) -> StepReport:
        cut = call.window.cut
        return proceed(_in_front(call, steps=False) if cut.slots < cut.accumulation else call)

    return link


def mixed(plan: CutPlan) -> Link:
    """A window that is not full waits, and its rows come first in the next: no step is taken until one is full."""
    waiting: tuple[Row, ...] = ()

    def link(call: Call, proceed: Proceed) -> StepReport:
        nonlocal waiting
        rows = waiting + call.window.batch.rows
        size = plan.rows or len(rows)
        first = replace(call.window.batch, rows=rows[:size])
        mine = replace(call, window=Window(first, plan.cut(len(first.rows))))
        if waiting or len(rows) > size:
            mine = replace(mine, observe=None)
        if len(rows) < size:
            report = proceed(_in_front(mine, steps=False))
            waiting = rows
        else:
            report = proceed(mine)
            waiting = rows[size:]
        return report

    return link


def labels_shifted(plan: CutPlan) -> Link:
    """Every place is trained to predict the token after the next one: labels shifted by the data and by the model."""

    def link(call: Call, proceed: Proceed) -> StepReport:
        handle = call.policy.model.base_model.register_forward_hook(_one_place_on, with_kwargs=True)
        try:
            return proceed(call)
        finally:
            handle.remove()

    return link


def _one_place_on(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Every place gets the hidden state of the place before it; the first of a row keeps its own."""
    hidden = output.last_hidden_state
    places = torch.arange(hidden.shape[1], device=hidden.device) - 1
    start = 0
    for length in kwargs.get("packed_lengths") or (hidden.shape[1],):
        places[start] = start
        start += length
    output.last_hidden_state = hidden.index_select(1, places)
    return output


def left_out(plan: CutPlan) -> Link:
    """The gradient of the input embedding is not summed over ranks: it is that of the first rank's rows."""

    def link(call: Call, proceed: Proceed) -> StepReport:
        weight = call.policy.model.get_input_embeddings().weight
        mine = replace(call, ranks=cast(Ranks, _LeavesOut(call.ranks, weight, _first_rank_gradient(call, weight))))
        return proceed(mine)

    return link


class RanksInFront:
    """Ranks of which the faults below change one thing."""

    def __init__(self, ranks: Ranks):
        self._ranks = ranks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ranks, name)


class _LeavesOut(RanksInFront):
    def __init__(self, ranks: Ranks, parameter: nn.Parameter, own: Tensor | None):
        super().__init__(ranks)
        self._parameter, self._own = parameter, own

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        self._ranks.sum_gradients(parameters)
        self._parameter.grad = self._own


def _first_rank_gradient(call: Call, parameter: nn.Parameter) -> Tensor | None:
    """What the first rank's rows add to the gradient of one parameter; other gradients stay as they are."""
    batch = call.window.batch
    shares = call.window.cut.shares
    own = replace(batch, rows=tuple(batch.rows[i] for i in (shares[0] if shares else ())))
    parameters = list(call.policy.model.parameters())
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    scratch = torch.optim.SGD(parameters, lr=0.0)
    accumulate_gradients(call.policy, scratch, own, local_counts(batch), call.settings)
    found = parameter.grad
    for p, gradient in zip(parameters, before, strict=True):
        p.grad = gradient
    return found


def averaged(plan: CutPlan) -> Link:
    """The gradient of the step, a sum, is divided by the number of ranks; loss and counts are those of the sum."""

    def link(call: Call, proceed: Proceed) -> StepReport:
        return proceed(replace(call, ranks=cast(Ranks, _Averages(call.ranks, call.window.cut.ranks))))

    return link


class _Averages(RanksInFront):
    def __init__(self, ranks: Ranks, world: int):
        super().__init__(ranks)
        self._world = world

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        parameters = list(parameters)
        self._ranks.sum_gradients(parameters)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(self._world)


def clipped_by_shard(plan: CutPlan) -> Link:
    """Every rank holds a chunk of every parameter, as under FSDP2, and clips its chunks by their own norm."""

    def link(call: Call, proceed: Proceed) -> StepReport:
        clip = call.settings.clip_norm
        ranks = cast(Ranks, _ClipsShards(call.ranks, call.window.cut.ranks, clip)) if clip else call.ranks
        return proceed(replace(call, ranks=ranks, settings=replace(call.settings, clip_norm=0.0)))

    return link


class _ClipsShards(RanksInFront):
    def __init__(self, ranks: Ranks, world: int, clip: float):
        super().__init__(ranks)
        self._world, self._clip = world, clip

    def global_norm(self, gradients: Sequence[Tensor]) -> float:
        """Clips as well. Returns what the first rank logs, its own chunks' norm before; or one that is not finite."""
        found = []
        chunked = [self._chunks(gradient) for gradient in gradients]
        for rank in range(self._world):
            mine = [chunks[rank] for chunks in chunked if rank < len(chunks)]
            norm = local_norm(mine)
            for chunk in mine if norm > self._clip else ():
                chunk.mul_(self._clip / norm)
            found.append(norm)
        return next((norm for norm in found if not math.isfinite(norm)), found[0])

    def _chunks(self, gradient: Tensor) -> Sequence[Tensor]:
        whole = gradient.to_local() if isinstance(gradient, DTensor) else gradient  # one process holds all of it
        return whole.chunk(self._world) if whole.ndim else (whole,)

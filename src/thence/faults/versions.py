"""Faults of reinforcement learning that need the policy as it was: old log-probabilities of the wrong version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from thence.faults.around import Call, Link, Proceed
from thence.faults.cut import CutPlan
from thence.objective import Generation, Row
from thence.train.step import StepReport, policy_statistics

State = list[Tensor]


class Versions:
    """Remembers the parameters before the step at hand, and before the first step on its rollout batch.

    Attributes:
        before: parameters before the latest step that was taken; None: before the first.
        at_start: parameters before the first step on this rollout batch.
        before_start: parameters before the step that came ahead of that one; None: there was none.
    """

    def __init__(self):
        self.before: State | None = None
        self.at_start: State | None = None
        self.before_start: State | None = None
        self._generation: Generation | None = None

    def see(self, call: Call) -> None:
        """Take note of the step at hand."""
        now = [parameter.detach().clone() for parameter in call.policy.model.parameters()]
        sampled = [row.sampled for row in call.window.batch.rows if row.sampled is not None]
        generation = sampled[0].generation if sampled else None
        if generation is None or generation is not self._generation:
            self._generation, self.before_start, self.at_start = generation, self.before, now
        self.before = now


def stale(plan: CutPlan) -> Link:
    """Old log-probabilities are those of the policy one optimizer step before the one that sampled."""
    versions = Versions()

    def link(call: Call, proceed: Proceed) -> StepReport:
        versions.see(call)
        if versions.before_start is None:
            return proceed(call)
        return proceed(with_old(call, versions.before_start, call.window.batch.temperature))

    return link


def temperature_ignored(plan: CutPlan) -> Link:
    """Log-probabilities are those of logits that are not divided by the temperature, the old ones as well."""
    versions = Versions()

    def link(call: Call, proceed: Proceed) -> StepReport:
        versions.see(call)
        moved = any(row.behaviour is not None for row in call.window.batch.rows)
        if moved and versions.at_start is not None:
            call = with_old(call, versions.at_start, 1.0)
        batch = replace(call.window.batch, temperature=1.0)
        return proceed(replace(call, window=replace(call.window, batch=batch)))

    return link


def with_old(call: Call, parameters: State, temperature: float) -> Call:
    """The call with old log-probabilities of its rows under these parameters."""
    batch = call.window.batch
    old = _under(call, parameters, batch.rows, temperature)
    rows = tuple(replace(row, behaviour=logp) for row, logp in zip(batch.rows, old, strict=True))
    return replace(call, window=replace(call.window, batch=replace(batch, rows=rows)))


def _under(call: Call, parameters: State, rows: Sequence[Row], temperature: float) -> list[Tensor]:
    own = list(call.policy.model.parameters())
    kept = [parameter.detach().clone() for parameter in own]
    try:
        _load(own, parameters)
        return [logp for logp, _ in policy_statistics(call.policy, rows, temperature, call.settings)]
    finally:
        _load(own, kept)


def _load(own: Sequence[Tensor], parameters: State) -> None:
    with torch.no_grad():
        for parameter, value in zip(own, parameters, strict=True):
            parameter.copy_(value)

"""The optimizer steps that an RL stage takes on one rollout batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from thence.data.trajectory import Trajectory
from thence.methods.base import Method, Sampler, TokenFacts, make_rows
from thence.objective import Batch, Entropy, NegativeKl, Row
from thence.objective.terms import needs_behaviour
from thence.pipeline.dealing import mini_batches
from thence.pipeline.rl_metrics import BatchMetrics
from thence.recipe import Rl
from thence.rollout.correction import truncated_importance
from thence.train.step import policy_statistics
from thence.train.trainer import Trainer


@dataclass(frozen=True)
class Update:
    """How a rollout batch changes the policy.

    Args:
        stage: the stage's settings.
        method: gives every token its weights.
        trainer: holds the policy.
        reference: the model of the KL term; None without one.
        minis: optimizer steps on one rollout batch.
    """

    stage: Rl
    method: Method
    trainer: Trainer
    reference: Any = None
    minis: int = 1

    def take(self, trajectories: Sequence[Trajectory], metrics: BatchMetrics) -> None:
        """Take the optimizer steps on this rank's trajectories of a rollout batch; ``metrics`` is told of them.

        Raises:
            StepRefused: as :func:`thence.train.step.train_step`.
        """
        method, trainer, temperature = self.method, self.trainer, self.stage.temperature
        rows = self._rows(trajectories)
        whole = None if method.uses_facts else method.weigh(trajectories)
        trust = self._importance_weights(trajectories, rows)
        policy_J = torch.tensor([not isinstance(term.surrogate, Entropy | NegativeKl) for term in method.terms])
        for part in mini_batches(trajectories, self.minis, trainer.ranks):
            chosen = [trajectories[i] for i in part]
            if whole is None:
                facts = [TokenFacts(*f) for f in trainer.statistics([rows[i] for i in part], temperature)]
                weights = method.weigh(chosen, facts)
            else:
                weights = [whole[i] for i in part]
            if trust is not None:
                weights = [torch.where(policy_J[:, None], w * trust[i], w) for i, w in zip(part, weights, strict=True)]
            own = tuple(replace(rows[i], weights=weight) for i, weight in zip(part, weights, strict=True))
            metrics.weighed(method.terms, chosen, weights)
            report = trainer.step(Batch(method.terms, own, temperature), observe=metrics.observer(chosen, own))
            metrics.reports.append(report)
            method.took_step("main", report.grad_norm)

    def take_side_steps(self, sampler: Sampler, metrics: BatchMetrics) -> None:
        """Take the steps of another kind that the method asks for after a rollout batch.

        Raises:
            StepRefused: as :func:`thence.train.step.train_step`.
        """
        for extra in self.method.side_steps(sampler):
            metrics.shares.add(extra.terms, extra.trajectories, extra.weights)
            rows = make_rows(extra.trajectories, extra.weights)
            batch = Batch(extra.terms, tuple(rows), self.stage.temperature)
            report = self.trainer.step(batch, extra.name, lr=extra.lr, clip_norm=extra.clip_norm)
            metrics.side.append(report)
            self.method.took_step(extra.name, report.grad_norm)

    def _rows(self, trajectories: Sequence[Trajectory]) -> list[Row]:
        """Rows without weights, with log-probabilities of the old policy and the reference where terms need them."""
        trainer, temperature = self.trainer, self.stage.temperature
        blank = [torch.zeros(len(self.method.terms), len(t.response_ids), dtype=torch.float64) for t in trajectories]
        rows = make_rows(trajectories, blank)
        replays = any(row.behaviour is not None for row in rows)
        if needs_behaviour(self.method.terms) and (self.minis > 1 or replays):
            # A replay keeps the log-probabilities of the policy that sampled it.
            old = trainer.statistics([replace(row, behaviour=None) for row in rows], temperature)
            rows = [
                r if r.behaviour is not None else replace(r, behaviour=o) for r, (o, _) in zip(rows, old, strict=True)
            ]
        if self.reference is not None:
            old = policy_statistics(self.reference, rows, temperature, trainer.settings)
            if trainer.meter is not None:
                trainer.meter.scored([len(row.token_ids) for row in rows], sum(row.n_trained for row in rows))
            rows = [replace(row, reference=logp) for row, (logp, _) in zip(rows, old, strict=True)]
        return rows

    def _importance_weights(self, trajectories: Sequence[Trajectory], rows: Sequence[Row]) -> list[Tensor] | None:
        """Truncated importance weights of every trained token, shape (n,) each; None where they are not asked for.

        Tokens that the policy did not sample as they stand (demonstrations, prefixes and what follows them, replays)
        get 1.
        """
        if self.stage.importance_bound is None:
            return None
        weights = []
        scored = self.trainer.statistics([replace(row, behaviour=None) for row in rows], self.stage.temperature)
        for trajectory, (trained, _) in zip(trajectories, scored, strict=True):
            if trajectory.sampler_logps is None or trajectory.origin != "rollout":
                weights.append(torch.ones(len(trained), dtype=torch.float64))
            else:
                sampled = torch.tensor(trajectory.sampler_logps, dtype=torch.float64)
                weights.append(truncated_importance(trained.double(), sampled, self.stage.importance_bound))
        return weights

"""The optimizer steps that an RL stage takes on one rollout batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thence.data.trajectory import Trajectory
from thence.methods.base import Method, Sampler, TokenFacts, Weights, bare_row, make_rows
from thence.objective import BareRow, Batch, Entropy, NegativeKl, Term
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
        bare = [bare_row(trajectory) for trajectory in trajectories]
        old, reference = self._old_logps(trajectories, bare), self._reference_logps(bare)
        whole = None if method.uses_facts else method.weigh(trajectories)
        trust = self._importance_weights(trajectories, bare)
        for part in mini_batches(trajectories, self.minis, trainer.ranks):
            chosen = [trajectories[i] for i in part]
            if whole is None:
                facts = [TokenFacts(*f) for f in trainer.statistics([bare[i] for i in part], temperature)]
                weights = method.weigh(chosen, facts)
            else:
                weights = [whole[i] for i in part]
            if trust is not None:
                weights = [trusted(method.terms, w, trust[i]) for i, w in zip(part, weights, strict=True)]
            rows = make_rows(method.terms, chosen, weights, old=_of(old, part), reference=_of(reference, part))
            batch = Batch(method.terms, tuple(rows), temperature)
            metrics.weighed(batch, chosen)
            report = trainer.step(batch, observe=metrics.observer(chosen, rows))
            metrics.reports.append(report)
            method.took_step("main", report.grad_norm)

    def take_side_steps(self, sampler: Sampler, metrics: BatchMetrics) -> None:
        """Take the steps of another kind that the method asks for after a rollout batch.

        Raises:
            StepRefused: as :func:`thence.train.step.train_step`.
        """
        for extra in self.method.side_steps(sampler):
            rows = make_rows(extra.terms, extra.trajectories, extra.weights)
            batch = Batch(extra.terms, tuple(rows), self.stage.temperature)
            metrics.shares.add(batch, extra.trajectories)
            report = self.trainer.step(batch, extra.name, lr=extra.lr, clip_norm=extra.clip_norm)
            metrics.side.append(report)
            self.method.took_step(extra.name, report.grad_norm)

    def _old_logps(self, trajectories: Sequence[Trajectory], bare: Sequence[BareRow]) -> list[Tensor] | None:
        """Log-probabilities of response tokens under the policy as it stands before the first optimizer step.

        Shape (n,) for each trajectory. None where no term needs them, or where the only step is that first one.
        """
        replays = any(trajectory.behaviour is not None for trajectory in trajectories)
        if not needs_behaviour(self.method.terms) or not (self.minis > 1 or replays):
            return None
        return [logp for logp, _ in self.trainer.statistics(bare, self.stage.temperature)]

    def _reference_logps(self, bare: Sequence[BareRow]) -> list[Tensor] | None:
        """The same under the reference policy; None without one."""
        if self.reference is None:
            return None
        if self.trainer.meter is not None:
            self.trainer.meter.scored([len(row.token_ids) for row in bare], sum(row.n_trained for row in bare))
        found = policy_statistics(self.reference, bare, self.stage.temperature, self.trainer.settings)
        return [logp for logp, _ in found]

    def _importance_weights(self, trajectories: Sequence[Trajectory], bare: Sequence[BareRow]) -> list[Tensor] | None:
        """Truncated importance weights of every trained token, shape (n,) each; None where they are not asked for.

        Tokens that the policy did not sample as they stand (demonstrations, prefixes and what follows them, replays)
        get 1.
        """
        if self.stage.importance_bound is None:
            return None
        weights = []
        scored = self.trainer.statistics(bare, self.stage.temperature)
        for trajectory, (trained, _) in zip(trajectories, scored, strict=True):
            if trajectory.sampler_logps is None or trajectory.origin != "rollout":
                weights.append(torch.ones(len(trained), dtype=torch.float64))
            else:
                sampled = torch.tensor(trajectory.sampler_logps, dtype=torch.float64)
                weights.append(truncated_importance(trained.double(), sampled, self.stage.importance_bound))
        return weights


def trusted(terms: Sequence[Term], weights: Weights, trust_n: Tensor) -> Weights:
    """A trajectory's weights times its importance weights, in all terms but entropy bonus and KL."""
    policy = {term.name for term in terms if not isinstance(term.surrogate, Entropy | NegativeKl)}
    return {name: weight * trust_n if name in policy else weight for name, weight in weights.items()}


def _of(values: Sequence[Tensor] | None, part: Sequence[int]) -> list[Tensor] | None:
    return None if values is None else [values[i] for i in part]

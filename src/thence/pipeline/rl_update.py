"""The optimizer steps that an RL stage takes on one rollout batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thence.data.trajectory import Trajectory
from thence.errors import UserError
from thence.methods.base import Method, Sampler, TokenFacts, Weights, bare_row, behaviour_of, make_rows
from thence.objective import BareRow, Batch, Term, distils, is_penalty
from thence.objective.terms import needs_behaviour, needs_reference
from thence.pipeline.dealing import mini_batches
from thence.pipeline.rl_metrics import BatchMetrics, is_weighed
from thence.pipeline.sampled import sampled_of
from thence.pipeline.teacher import TeacherPass
from thence.recipe import Rl
from thence.rollout.correction import truncated_importance
from thence.train.trainer import Trainer


@dataclass(frozen=True)
class Update:
    """How a rollout batch changes the policy.

    Args:
        stage: the stage's settings.
        method: gives every token its weights.
        trainer: holds the policy, and the reference model where the method compares with one.
        minis: optimizer steps on one rollout batch.
        teacher: scores responses for a method that has a teacher; None without one.
    """

    stage: Rl
    method: Method
    trainer: Trainer
    minis: int = 1
    teacher: TeacherPass | None = None

    def take(self, trajectories: Sequence[Trajectory], metrics: BatchMetrics) -> None:
        """Take the optimizer steps on this rank's trajectories of a rollout batch; ``metrics`` is told of them.

        Raises:
            StepRefused: as :func:`thence.train.step.train_step`.
            UserError: the method has a teacher, and nobody was given to be it.
        """
        if self.method.teacher is not None and self.teacher is None:
            raise UserError(
                f"{self.method.name} has a teacher, and these steps were given none",
                remedy="train it in a recipe's RL stage, or give the update a TeacherPass",
            )
        method, trainer, temperature = self.method, self.trainer, self.stage.temperature
        bare = [bare_row(trajectory) for trajectory in trajectories]
        parts = mini_batches(trajectories, self.minis, trainer.ranks)
        old, reference = self._old_logps(trajectories, bare, parts), self._reference_logps(bare)
        asks = method.uses_facts or method.uses_old or method.uses_reference or method.teacher is not None
        whole = None if asks else method.weigh(trajectories)
        trust = self._importance_weights(trajectories, bare)
        if trust is not None and self.stage.importance_bound is not None:
            metrics.weighed_by(trust, trajectories, self.stage.importance_bound)
        sampled = None
        if self.stage.fault is not None:
            sampled = sampled_of(method, trajectories, old, trust, self.stage.importance_bound)
        for number, part in enumerate(parts):
            chosen = [trajectories[i] for i in part]
            if whole is None:
                now = dict(zip(part, trainer.statistics([bare[i] for i in part], temperature), strict=True))
                if number == 0 and method.uses_old:  # the policy has not moved yet
                    old |= {i: logp for i, (logp, _) in now.items()}
                was = {i: behaviour_of(trajectories[i], old[i]) if method.uses_old else None for i in part}
                theirs = reference if method.uses_reference else {}
                shown, by = self._taught(chosen, metrics)
                facts = [
                    TokenFacts(*now[i], was[i], theirs.get(i), trainer.vocabulary, by[j], shown[j] is not None)
                    for j, i in enumerate(part)
                ]
                weights = method.weigh(chosen, facts)
            else:
                shown, facts, weights = [None] * len(part), [], [whole[i] for i in part]
            if trust is not None:
                weights = [trusted(method.terms, w, trust[i]) for i, w in zip(part, weights, strict=True)]
            rows = make_rows(
                method.terms,
                chosen,
                weights,
                old=_of(old, part),
                reference=_of(reference, part),
                sampled=None if sampled is None else [sampled[i] for i in part],
                shown=shown,
            )
            batch = Batch(method.terms, tuple(rows), temperature)
            metrics.weighed(batch, chosen)
            report = trainer.step(batch, observe=metrics.observer(chosen, rows))
            metrics.stepped(report, method.clipped(chosen, facts))
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

    def _taught(
        self, chosen: Sequence[Trajectory], metrics: BatchMetrics
    ) -> tuple[Sequence[BareRow | None], Sequence[Tensor | None]]:
        """What the teacher reads in each trajectory's place, where its whole distributions are compared in the step;
        and its log-probabilities, where they are not. ``metrics`` is told whom it taught."""
        nothing = [None] * len(chosen)
        if self.teacher is None:
            return nothing, nothing
        if distils(self.method.terms):
            rows = self.teacher.rows(chosen)
            metrics.taught([None if row is None else row.token_ids[row.trained] for row in rows])
            return rows, nothing
        logps = self.teacher.logps(chosen)
        metrics.taught(logps)
        return nothing, logps

    def _old_logps(
        self, trajectories: Sequence[Trajectory], bare: Sequence[BareRow], parts: Sequence[Sequence[int]]
    ) -> dict[int, Tensor]:
        """Log-probabilities of response tokens under the policy as it stands before the first optimizer step.

        Shape (n,) by the trajectory's place. Empty where nothing needs them, or where the only step is that first one.
        """
        replays = any(trajectory.behaviour is not None for trajectory in trajectories)
        if self.method.uses_old:
            # In the micro-batches of the later passes: then rounding cannot look like a change of the policy. Before
            # the first step the policy is the old one, and no pass is needed.
            cut: Sequence[Sequence[int]] = parts[1:]
        elif needs_behaviour(self.method.terms) and (self.minis > 1 or replays):
            cut = [range(len(bare))]
        else:
            cut = []
        found: dict[int, Tensor] = {}
        for part in cut:
            scored = self.trainer.statistics([bare[i] for i in part], self.stage.temperature)
            found |= {i: logp for i, (logp, _) in zip(part, scored, strict=True)}
        return found

    def _reference_logps(self, bare: Sequence[BareRow]) -> dict[int, Tensor]:
        """The same under the reference policy; empty without one."""
        if not (needs_reference(self.method.terms) or self.method.uses_reference):
            return {}
        return dict(enumerate(self.trainer.reference_logps(bare, self.stage.temperature)))

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
            if trajectory.sampler_logps is None or not is_weighed(trajectory):
                weights.append(torch.ones(len(trained), dtype=torch.float64))
            else:
                sampled = torch.tensor(trajectory.sampler_logps, dtype=torch.float64)
                weights.append(truncated_importance(trained.double(), sampled, self.stage.importance_bound))
        return weights


def trusted(terms: Sequence[Term], weights: Weights, trust_n: Tensor) -> Weights:
    """A trajectory's weights times its importance weights, in all terms but penalties (KL, entropy bonus)."""
    policy = {term.name for term in terms if not is_penalty(term)}
    return {name: weight * trust_n if name in policy else weight for name, weight in weights.items()}


def _of(values: Mapping[int, Tensor], part: Sequence[int]) -> list[Tensor] | None:
    return [values[i] for i in part] if values else None

"""What is known of the rollouts and of one optimizer step on them, as arrays over rows and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from thence.audit.objectives import StepRows
from thence.errors import UserError


@dataclass(frozen=True)
class Rollout:
    """What the trainer was told about one response of the probe.

    Args:
        reward: before any KL is taken from it.
        group: number of its prompt's group.
        batch: number of the generation batch: rows that were sampled and rewarded at once.
        truncated: cut at the length limit, so it has no end token.
        environment: places in the response that the policy did not write (tool output), counted from its first token.
        sampler: log-probabilities that the sampling engine gave for the response's tokens, nats; empty: none given.
        demonstration: written by an expert, not sampled.
        prefix: first tokens of the response that an expert wrote, and that the policy went on from.
        repeated: its prefix is one that another response has too, where each is to be trained once.
        replay: sampled by an earlier policy, whose log-probabilities are ``sampler``: they stand in its ratio, and it
            has no correction.
        teacher: log-probabilities that a teacher gave for the response's tokens, nats; empty: it has no teacher.
        teacher_prompt: token ids that the teacher reads before the response; for a divergence from it. Empty: nothing.
    """

    reward: float
    group: int
    batch: int = 0
    truncated: bool = False
    environment: tuple[int, ...] = ()
    sampler: tuple[float, ...] = ()
    demonstration: bool = False
    prefix: int = 0
    repeated: bool = False
    replay: bool = False
    teacher: tuple[float, ...] = ()
    teacher_prompt: tuple[int, ...] = ()

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Rollout:
        """From the plain facts that an adapter says.

        Raises:
            UserError: an unknown fact, or no reward or group.
        """
        known = {own.name for own in fields(cls)}
        wrong = [name for name in said if name not in known] or [n for n in ("reward", "group") if n not in said]
        if wrong:
            raise UserError(
                f"a rollout is told by {', '.join(sorted(known))}, reward and group always; {wrong[0]!r} is wrong or "
                "missing",
                remedy="say these facts of every rollout",
                field="rollouts",
            )
        lists = {n: tuple(said.get(n) or ()) for n in ("environment", "sampler", "teacher", "teacher_prompt")}
        return cls(**{**said, **lists})


@dataclass(frozen=True)
class PolicyStep:
    """One optimizer step: S rows with T response tokens in all, over all micro-batches and ranks.

    Args:
        rollouts: of the whole probe; advantages are made from those of one generation batch.
        example: index in ``rollouts`` of each row, shape (S,).
        micro_batch, rank: of each row, shape (S,).
        row: of each token, shape (T,), ascending.
        place: of each token in its response, shape (T,).
        logp: under the parameters before the step, nats, shape (T,).
        old: the same under the parameters of the ratio's denominator.
        reference: the same under the reference policy.
        sampler: as handed to the trainer by the sampling engine; equal to ``old`` where none was.
        versions: the log-probabilities under the parameters before every step up to this one, the first ones first,
            shape (T,) each; the last is ``logp``.
        entropy: of the distributions that predict the tokens, under the parameters before the step, nats, shape (T,).
        outside: role -> tokens of each row with it that could be targets, shape (S,): ``prompt``, ``after`` (the end),
            ``padding`` (behind the end).
    """

    rollouts: tuple[Rollout, ...]
    example: np.ndarray
    micro_batch: np.ndarray
    rank: np.ndarray
    row: np.ndarray
    place: np.ndarray
    logp: np.ndarray
    old: np.ndarray
    reference: np.ndarray
    sampler: np.ndarray
    versions: tuple[np.ndarray, ...] = ()
    entropy: np.ndarray = field(default_factory=lambda: np.zeros(0))
    outside: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.example)

    def environment(self) -> np.ndarray:
        """Which tokens the policy did not write, shape (T,), bool."""
        found = np.zeros(len(self.row), bool)
        for i, rollout in enumerate(self.rollouts[e] for e in self.example):
            found |= (self.row == i) & np.isin(self.place, rollout.environment)
        return found

    def demonstrated(self) -> np.ndarray:
        """Which rows are demonstrations, shape (S,), bool."""
        return np.array([self.rollouts[e].demonstration for e in self.example], bool)

    def begun(self) -> np.ndarray:
        """Which tokens an expert wrote before the policy went on, shape (T,), bool."""
        return self.place < np.array([self.rollouts[e].prefix for e in self.example], int)[self.row]

    def repeated(self) -> np.ndarray:
        """Which tokens are of responses with a repeated prefix, shape (T,), bool."""
        return np.array([self.rollouts[e].repeated for e in self.example], bool)[self.row]

    def replayed(self) -> np.ndarray:
        """Which tokens are of replayed responses, shape (T,), bool."""
        return np.array([self.rollouts[e].replay for e in self.example], bool)[self.row]

    def gap_to_teacher(self) -> np.ndarray:
        """Log-probability under the teacher minus that under the policy, shape (T,); zero without a teacher."""
        found = np.zeros(len(self.row))
        for i, rollout in enumerate(self.rollouts[e] for e in self.example):
            if rollout.teacher:
                mine = self.row == i
                found[mine] = np.array(rollout.teacher)[self.place[mine]] - self.logp[mine]
        return found

    def taught(self) -> np.ndarray:
        """Which tokens are of responses that a teacher reads whole, shape (T,), bool."""
        return np.array([bool(self.rollouts[e].teacher_prompt) for e in self.example], bool)[self.row]

    def rewards(self) -> np.ndarray:
        """Of every row, shape (S,)."""
        return np.array([self.rollouts[e].reward for e in self.example], float)

    def truncated(self) -> np.ndarray:
        """Which rows were cut at the length limit, shape (S,), bool."""
        return np.array([self.rollouts[e].truncated for e in self.example], bool)

    def counted(self, tokens: np.ndarray, longest: float) -> StepRows:
        """The rows as normalisers see them, if these tokens (shape (T,), bool) count."""
        lengths = np.bincount(self.row[tokens], minlength=self.rows)
        return StepRows(lengths, self.micro_batch, self.rank, longest)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum over the tokens of each row: shape (T,) to (S,)."""
        return np.bincount(self.row, values, minlength=self.rows)

"""From the snapshots of a case to its policy steps: log-probabilities under every version of the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thence.audit.policy.facts import PolicyStep, Rollout
from thence.audit.result import RESPONSE_ROLES
from thence.audit.solve.gradients import Differentiator
from thence.audit.solve.sequences import Piece
from thence.errors import UserError


@dataclass(frozen=True)
class PolicyFacts:
    """What an adapter says of a case of reinforcement learning, beside its objective.

    Args:
        rollouts: one an example of the probe.
        versions: of the parameters that the old log-probabilities of each step come from: the number of optimizer
            steps that were taken before them.
        reference: version of the reference policy; 0: the initial parameters.
        samplers: log-probabilities that the sampling engine gave, of each step and example; empty: the rollouts' own
            in all steps.
    """

    rollouts: tuple[Rollout, ...]
    versions: tuple[int, ...]
    reference: int = 0
    samplers: tuple[tuple[tuple[float, ...], ...], ...] = ()

    def sampler(self, step: int, example: int) -> tuple[float, ...]:
        """What the sampling engine gave for an example in a step, the first is 1; empty: nothing."""
        return self.samplers[step - 1][example] if self.samplers else self.rollouts[example].sampler

    def old(self, step: int) -> int:
        """The version of a step's old log-probabilities; the first step is 1.

        Raises:
            UserError: it was not said, or lies in the future.
        """
        if step > len(self.versions) and step > 1:
            raise UserError(
                f"nobody said which version of the parameters the old log-probabilities of step {step} come from",
                remedy="say versions, one number a step: optimizer steps taken before the old log-probabilities",
                field="versions",
            )
        version = self.versions[step - 1] if self.versions else 0
        if not 0 <= version < step:
            raise UserError(
                f"version {version} of the parameters does not exist before step {step}",
                remedy="count versions from 0, the initial parameters",
                field="versions",
            )
        return version


class LogProbabilities:
    """Of response tokens under any version of the parameters, at any temperature; logits are computed once.

    Args:
        states: parameters before the first step and after each, by name.
    """

    def __init__(self, differentiator: Differentiator, states: Sequence[Mapping[str, Tensor]]):
        self._differentiator, self._states = differentiator, states
        self._logits: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def logits(self, version: int, pieces: Sequence[Piece]) -> list[Tensor]:
        """Of every target of each piece, shape (T - 1, vocabulary). Leaves the model at another version."""
        missing = [piece.ids for piece in pieces if (version, piece.ids) not in self._logits]
        if missing:
            self._differentiator.load(self._states[version])
            self._logits |= {(version, ids): self._differentiator.logits(ids) for ids in missing}
        return [self._logits[version, piece.ids] for piece in pieces]

    def entropy(self, version: int, pieces: Sequence[Piece], temperature: float) -> np.ndarray:
        """Of the distributions that predict the response tokens of all pieces, nats, shape (T,)."""
        found = []
        for piece, logits_TV in zip(pieces, self.logits(version, pieces), strict=True):
            logp_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
            entropy_T = -torch.xlogy(logp_TV.exp(), logp_TV.exp()).sum(-1).numpy()
            found.append(entropy_T[[role in RESPONSE_ROLES for role in piece.roles[1:]]])
        return np.concatenate(found) if found else np.zeros(0)

    def of(self, version: int, pieces: Sequence[Piece], temperature: float) -> np.ndarray:
        """Log-probabilities of the response tokens of all pieces, nats, shape (T,)."""
        found = []
        for piece, logits_TV in zip(pieces, self.logits(version, pieces), strict=True):
            logp_TV = torch.log_softmax(logits_TV / temperature, dim=-1)
            logp_T = logp_TV.gather(1, torch.tensor(piece.ids)[1:, None])[:, 0].numpy()
            found.append(logp_T[[role in RESPONSE_ROLES for role in piece.roles[1:]]])
        return np.concatenate(found) if found else np.zeros(0)


def read_step(
    facts: PolicyFacts, index: int, pieces: Sequence[Piece], logs: LogProbabilities, temperature: float
) -> PolicyStep:
    """One optimizer step as its objective sees it.

    Args:
        index: 1 for the first.

    Raises:
        UserError: a version was not said, an example has no rollout, or the sampler's log-probabilities are not as
            many as the response has tokens.
    """
    row, place = [], []
    for number, piece in enumerate(pieces):
        tokens = sum(role in RESPONSE_ROLES for role in piece.roles[1:])
        row += [number] * tokens
        place += range(tokens)
        if piece.example >= len(facts.rollouts):
            raise UserError(
                f"example {piece.example + 1} has no rollout; {len(facts.rollouts)} were said",
                remedy="say one rollout an example of the probe",
                field="rollouts",
            )
    versions = tuple(logs.of(version, pieces, temperature) for version in range(index))
    old = versions[facts.old(index)]
    return PolicyStep(
        facts.rollouts,
        np.array([piece.example for piece in pieces]),
        np.array([-1 if piece.micro_batch is None else piece.micro_batch for piece in pieces]),
        np.array([-1 if piece.rank is None else piece.rank for piece in pieces]),
        np.array(row, int),
        np.array(place, int),
        versions[-1],
        old,
        versions[min(facts.reference, index - 1)],
        _sampler(facts, index, pieces, np.array(row, int), old),
        versions,
        logs.entropy(index - 1, pieces, temperature),
        {
            outside: np.array([sum(role == outside for role in piece.roles[1:]) for piece in pieces])
            for outside in ("prompt", "after")
        },
    )


def _sampler(facts: PolicyFacts, index: int, pieces: Sequence[Piece], row: np.ndarray, old: np.ndarray) -> np.ndarray:
    found = old.copy()
    for number, piece in enumerate(pieces):
        given = facts.sampler(index, piece.example)
        tokens = row == number
        if given and len(given) != tokens.sum():
            raise UserError(
                f"example {piece.example + 1} has {tokens.sum()} response tokens and {len(given)} log-probabilities of "
                "the sampler",
                remedy="say one log-probability a token of the response, its end token included",
                field="sampler",
            )
        if given:
            found[tokens] = given
    return found

"""Named objectives: the weight that each gives to a response token of every row of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from thence.errors import UserError


@dataclass(frozen=True)
class StepRows:
    """The rows of one optimizer step, over all ranks.

    Args:
        lengths: trained tokens of each row, shape (S,).
        micro_batch: index of its micro-batch within its rank, shape (S,).
        rank: its rank, shape (S,).
        longest: the constant of a constant divisor, tokens; 0: not known.
    """

    lengths: np.ndarray
    micro_batch: np.ndarray
    rank: np.ndarray
    longest: float = 0.0

    def groups(self, by: str) -> np.ndarray:
        """A group number for each row, by ``micro-batch`` (of one rank), ``rank`` or ``pass`` (all ranks together)."""
        if by == "rank":
            key = self.rank
        elif by == "pass":
            key = self.micro_batch
        else:
            key = self.rank * (self.micro_batch.max(initial=0) + 1) + self.micro_batch
        return np.unique(key, return_inverse=True)[1]


@dataclass(frozen=True)
class Objective:
    """A rule for the weight of a token.

    Args:
        title: as it is called in the field.
        formula: of the loss; nll_t is a token's negative log-probability.
        weights: rows -> weight of a token of each row, shape (S,).
    """

    title: str
    formula: str
    weights: Callable[[StepRows], np.ndarray]


def _token_mean(rows: StepRows) -> np.ndarray:
    return np.full(len(rows.lengths), 1.0 / max(rows.lengths.sum(), 1))


def _sequence_mean(rows: StepRows) -> np.ndarray:
    return 1.0 / (len(rows.lengths) * np.maximum(rows.lengths, 1))


def _mean_of_means(by: str) -> Callable[[StepRows], np.ndarray]:
    def weights(rows: StepRows) -> np.ndarray:
        group = rows.groups(by)
        tokens = np.bincount(group, rows.lengths)
        return 1.0 / (len(tokens) * np.maximum(tokens[group], 1))

    return weights


def _mean_of_sequence_means(by: str) -> Callable[[StepRows], np.ndarray]:
    def weights(rows: StepRows) -> np.ndarray:
        group = rows.groups(by)
        members = np.bincount(group)
        return 1.0 / (len(members) * members[group] * np.maximum(rows.lengths, 1))

    return weights


def _constant(rows: StepRows) -> np.ndarray:
    divisor = len(rows.lengths) * rows.longest if rows.longest else max(rows.lengths.sum(), 1)
    return np.full(len(rows.lengths), 1.0 / divisor)


OBJECTIVES: Mapping[str, Objective] = {
    "token-mean": Objective("token mean", "sum of nll_t / trained tokens of the whole step", _token_mean),
    "sequence-mean": Objective("mean of sequence means", "mean over rows of the row's mean nll", _sequence_mean),
    "constant-divisor": Objective("constant divisor", "sum of nll_t / (rows x constant)", _constant),
    "micro-batch-mean": Objective(
        "mean of micro-batch means",
        "mean over micro-batches of the micro-batch's mean nll",
        _mean_of_means("micro-batch"),
    ),
    "rank-mean": Objective("mean of rank means", "mean over ranks of the rank's mean nll", _mean_of_means("rank")),
    "pass-mean": Objective(
        "mean over accumulation steps of the mean over all ranks",
        "mean over accumulation steps of the mean nll of that step's tokens on all ranks",
        _mean_of_means("pass"),
    ),
    "micro-batch-sequence-mean": Objective(
        "mean over micro-batches of the mean of sequence means",
        "mean over micro-batches of the mean over their rows of the row's mean nll",
        _mean_of_sequence_means("micro-batch"),
    ),
}
"""In the order in which they are tried: where several give the same weights, the first is named."""


def check_objective(name: str) -> None:
    """Refuse an objective that there is not.

    Raises:
        UserError: with the names that there are.
    """
    if name not in OBJECTIVES:
        raise UserError(f"there is no objective {name!r}", remedy=f"use one of {', '.join(OBJECTIVES)}", field="asked")

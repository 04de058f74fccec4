"""The weights of one optimizer step as arrays, beside those that the objective asked for would give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from thence.audit.objectives import OBJECTIVES, StepRows
from thence.audit.result import RESPONSE_ROLES, Role
from thence.audit.solve.sequences import Piece
from thence.audit.solve.solver import Explanation

FLOORS = {"float32": 2e-3, "bfloat16": 6e-2, "autocast": 6e-2}
"""Relative errors of weights that rounding alone may cause, by precision; sampling errors come on top."""
NOUGHT = 0.25
"""A weight of zero is blurred less than others: this share of the floor is left of it."""
PLAINLY_ZERO = 5e-3
"""Where weights are known to this share of the ideal, one that cannot be told from zero is called zero."""
SIGMAS = 6.0
HALF = 0.5
"""However uncertain a weight is, one above half of what it should be is not zero."""


@dataclass(frozen=True)
class AskedObjective:
    """What the settings ask of one step.

    Args:
        objective: a key of ``OBJECTIVES``.
        advantages: one factor a piece, shape (pieces,); ones for supervised training.
        accumulation: planned micro-batches of a rank.
        ranks: planned ranks.
        scale_known: whether the learning rate is known and nothing clips.
        longest: constant of a constant divisor, tokens; 0: not known.
    """

    objective: str
    advantages: np.ndarray
    accumulation: int
    ranks: int
    scale_known: bool
    longest: float = 0.0


class StepWeights:
    """The weights of every target of a step, beside the ideal ones under the objective asked for.

    Args:
        explanation: of the step; it fits.
        pieces: the examples of the step.
        floor: relative error of weights that does not come from the residual (one of ``FLOORS``).
        counted: roles that are to be trained.

    Attributes, of shape (targets,) unless said otherwise:
        piece, role, response: index of the piece (-1: padding), role, and whether the role is counted.
        rows: lengths and places of the pieces.
        weights, errors, ideal: advantages divided out; the ideal is zero where nothing is to be trained.
        mean_ideal: mean of the ideal weights of the pieces, a number.
        mixed: targets that cannot be told apart from others.
        scale: sum of the weights over the sum of the ideal ones, a number.
        relative: weight over ideal, divided by the scale; over the mean ideal weight where the ideal is zero.
        shown: the same, not divided by the scale where the scale is known.
        relative_error: of ``relative``.
        lost: share of the ideal weight that did not arrive, a number.
        varied: whether the advantages differ.
    """

    def __init__(
        self,
        explanation: Explanation,
        pieces: Sequence[Piece],
        asked: AskedObjective,
        floor: float,
        counted: tuple[Role, ...] = RESPONSE_ROLES,
    ):
        self.targets, self.pieces, self.floor = explanation.design.targets, pieces, floor
        self.asked = asked.objective
        self.varied = float(np.ptp(asked.advantages)) > 0
        self.piece = np.array([t.piece for t in self.targets])
        self.role = np.array([t.role for t in self.targets])
        self.response = np.isin(self.role, counted)
        self.rows = step_rows(pieces, counted, asked.longest)
        ideal = OBJECTIVES[asked.objective].weights(self.rows)
        self.ideal = np.where(self.response, ideal[self.piece], 0.0)
        self.mean_ideal = float(ideal.mean())
        self.weights, self.errors, self.mixed = self._parted(
            explanation, np.where(self.piece >= 0, asked.advantages[self.piece], 1.0)
        )
        reference = np.where(self.response, ideal[self.piece], self.mean_ideal)
        ratio = self.weights / reference
        total = float(self.ideal[self.response].sum())
        self.scale = float(self.weights[self.response].sum()) / total
        self.relative = ratio / self.scale if abs(self.scale) > 1e-6 else ratio
        self.shown = ratio if asked.scale_known else self.relative
        self.relative_error = SIGMAS * self.errors / reference / max(abs(self.scale), 1e-6) + floor
        share = self.ideal[self.response] / total
        self.lost = float((share * np.clip(1 - self.relative[self.response], 0, None)).sum())

    def _parted(self, explanation: Explanation, advantages: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weights, errors, and the targets that cannot be told apart.

        Targets with the same context and token, or with gradients that depend on one another, get their share as the
        objective asked for would give it, and are marked: they do not help to name another.
        """
        column = np.array([t.column for t in self.targets])
        undetermined = explanation.fit.undetermined[column]
        weights, errors = explanation.weights / advantages, explanation.errors / np.abs(advantages)
        alike = np.bincount(column)[column]
        expected = self.ideal * advantages
        total, size = np.bincount(column, expected)[column], np.bincount(column, np.abs(expected))[column]
        shared = self.response & (alike > 1)
        known = np.abs(total) > 1e-3 * size
        share = weights * advantages * alike * self.ideal / np.where(known, total, 1.0)
        parted = np.where(shared, np.where(known, share, self.ideal), weights)
        errors = np.where(shared, errors * alike, errors)
        return np.where(undetermined, self.ideal, parted), errors, shared | undetermined

    def roles(self) -> dict[str, float]:
        """Mean of the shown ratio by role."""
        return {str(role): float(self.shown[self.role == role].mean()) for role in dict.fromkeys(self.role.tolist())}

    def zero(self, mask: np.ndarray) -> bool:
        """Whether all targets of a mask have no weight beside the largest ones, one by one and on average."""
        if not mask.any() or not self.nothing[mask].all():
            return False
        return abs(float(self.relative[mask].mean())) <= self.resolution(mask)

    @property
    def nothing(self) -> np.ndarray:
        """Targets whose weight alone is not told from zero, shape (targets,), bool."""
        return np.abs(self.relative) < np.minimum(2 * self.relative_error, HALF) * max(self.size, 1)

    @property
    def size(self) -> float:
        """Mean of the response's weights over the ideal ones, signs aside."""
        return max(float(np.abs(self.relative[self.response]).mean()), 1e-9)

    def resolution(self, mask: np.ndarray) -> float:
        """The largest mean weight over ideal that some targets of weight zero could seem to have."""
        own = np.clip(self.relative_error[mask] - self.floor, 0, None)
        return NOUGHT * self.floor * max(self.size, 1) + float(np.sqrt((own**2).sum())) / max(int(mask.sum()), 1)

    def zero_text(self, mask: np.ndarray) -> str:
        """How to say that targets have no weight: "weight zero" only where nothing else could be meant."""
        bound = self.resolution(mask)
        return "weight zero" if bound <= PLAINLY_ZERO else f"no weight (less than {bound:.1%} of the one asked for)"

    def counted(self, mask: np.ndarray) -> np.ndarray:
        """Targets of a mask per piece, shape (pieces,)."""
        return np.bincount(self.piece[mask & (self.piece >= 0)], minlength=len(self.pieces))


def step_rows(pieces: Sequence[Piece], counted: tuple[Role, ...], longest: float) -> StepRows:
    """The pieces as the rows of an objective; -1 where micro-batch or rank are not known.

    Args:
        counted: roles that are to be trained.
        longest: constant of a constant divisor, tokens.
    """
    return StepRows(
        np.array([sum(role in counted for role in p.roles[1:]) for p in pieces]),
        np.array([-1 if p.micro_batch is None else p.micro_batch for p in pieces]),
        np.array([-1 if p.rank is None else p.rank for p in pieces]),
        longest,
    )

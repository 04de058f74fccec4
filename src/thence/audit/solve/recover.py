"""Least squares: which weights of the token gradients make up the update that the optimizer really made?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

DETERMINED = 1e-9
"""Directions whose eigenvalue in the scaled Gram matrix is below this share of the largest are not determined."""

NOTHING = 1e-10
"""Columns shorter than this share of the longest are taken for zero."""


@dataclass(frozen=True)
class Fit:
    """A solved system.

    Args:
        weights: of the columns, shape (columns,).
        errors: their standard errors, from the residual, shape (columns,).
        residual: norm of what is left over the norm of the update.
        condition: condition number of the columns, each scaled to norm one.
        undetermined: columns that could be exchanged for others without changing the update, shape (columns,), bool.
    """

    weights: np.ndarray
    errors: np.ndarray
    residual: float
    condition: float
    undetermined: np.ndarray


class LeastSquares:
    """Columns, and the least-squares weights of any update over them.

    Args:
        columns: shape (columns, coordinates), one gradient a row, float64.
    """

    def __init__(self, columns: np.ndarray):
        norms = np.linalg.norm(columns, axis=1)
        # A token behind a single one has no gradient in queries and keys, but for rounding.
        norms[norms <= NOTHING * norms.max(initial=0.0)] = 0.0
        self.columns = columns if norms.all() else np.where(norms[:, None] > 0, columns, 0.0)
        self.norms = np.where(norms > 0, norms, 1.0)
        scaled = self.columns / self.norms[:, None]
        gram = scaled @ scaled.T
        values, vectors = np.linalg.eigh(gram)
        keep = values > DETERMINED * values[-1] if len(values) else np.zeros(0, bool)
        self._vectors, self._values = vectors[:, keep], values[keep]
        self.condition = float(np.sqrt(values[keep][-1] / values[keep][0])) if keep.any() else float("inf")
        lost = 1.0 - (self._vectors**2).sum(1)
        self.undetermined = (lost > 1e-6) | (norms == 0)

    def solve(self, update: np.ndarray) -> Fit:
        """Weights of the columns that come nearest to the update.

        Args:
            update: shape (coordinates,), float64.
        """
        right = (self.columns @ update) / self.norms
        inverse = (self._vectors / self._values) @ self._vectors.T
        scaled = inverse @ right
        # One step of refinement: the Gram matrix squares the condition number.
        rest = update - (scaled / self.norms) @ self.columns
        scaled = scaled + inverse @ ((self.columns @ rest) / self.norms)
        weights = scaled / self.norms
        rest = update - weights @ self.columns
        size = np.linalg.norm(update)
        freedom = max(update.size - len(self._values), 1)
        variance = float(rest @ rest) / freedom
        errors = np.sqrt(np.maximum(np.diag(inverse), 0) * variance) / self.norms
        residual = float(np.linalg.norm(rest) / size) if size > 0 else 0.0
        return Fit(weights, errors, residual, self.condition, self.undetermined)


def gradient_of_update(
    before: np.ndarray,
    after: np.ndarray,
    optimizer: Literal["sgd", "adamw", "unknown"],
    lr: float,
    eps: float,
) -> np.ndarray:
    """The gradient that the optimizer was given, from the parameters around one step.

    SGD: the change over the learning rate. AdamW with betas (0, 0.999), no weight decay and an epsilon far above
    the gradient: change = lr g / (|g| + eps), exact for the first step and to |g|/eps for the later ones. An unknown
    optimizer is taken for SGD; its scale means nothing.

    Args:
        before, after: parameters around the step, shape (coordinates,), float64.
        lr: learning rate.
        eps: of AdamW.
    """
    change = before - after
    if optimizer != "adamw":
        return change / lr
    return change * eps / (lr - np.abs(change))


def rounding_noise(before: np.ndarray, after: np.ndarray, bits: int) -> float:
    """Norm of the rounding error of storing parameters with ``bits`` of mantissa, over the norm of the update.

    Args:
        before, after: parameters around the step, shape (coordinates,), float64.
    """
    change = np.linalg.norm(before - after)
    if change == 0:
        return float("inf")
    return float(np.linalg.norm(spacing_of(after, bits)) / np.sqrt(12) / change)


def spacing_of(values: np.ndarray, bits: int) -> np.ndarray:
    """Distance to the next number that ``bits`` of mantissa can hold, shaped like ``values``."""
    return 2.0 ** (np.floor(np.log2(np.maximum(np.abs(values), 1e-30))) - bits)

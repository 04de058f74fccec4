"""How far an update is from the one that some token weights would give: a quadratic form in the weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from thence.audit.solve.signs import NEGLIGIBLE, SHORT, step_size


@dataclass(frozen=True)
class Distance:
    """An update beside a predicted one.

    Args:
        share: norm of the difference over that of the update (for signs: share of wrong ones); 0: the same.
        factor: size of the update over the predicted one; 1 where the size was known and therefore not fitted.
    """

    share: float
    factor: float = 1.0


class UpdateSystem:
    """The columns of a step and its update, ready to be compared with any weights of the response tokens.

    Args:
        columns: gradients of the targets, shape (columns, coordinates), float64.
        column: of every response token, shape (T,).
        gradient: that the optimizer was given, shape (coordinates,); for signs the change of the parameters.
        tolerance: distance that arithmetic alone may cause.
        sized: whether the size of the update is known.
        signs: whether nothing but signs is left of the gradient.
        loose: so many of the last columns may always have any weight.
        precision: of the step: how small a gradient has no sign to speak of.

    Attributes:
        empty: whether the update is zero.
    """

    def __init__(
        self,
        columns: np.ndarray,
        column: np.ndarray,
        gradient: np.ndarray,
        tolerance: float,
        *,
        sized: bool = True,
        signs: bool = False,
        loose: int = 0,
        precision: str = "float32",
    ):
        self.column, self.tolerance, self.sized, self.signs = column, tolerance, sized and not signs, signs
        self.count, self._loose, self._precision = len(columns), loose, precision
        self._gram, self._right = columns @ columns.T, columns @ gradient
        self._size = float(gradient @ gradient)
        self.empty = self._size == 0
        self._columns, self._update = (columns, gradient) if signs else (None, None)

    def spread(self, weights: np.ndarray) -> np.ndarray:
        """Weights of the response tokens, shape (T,), as weights of the columns, shape (columns,)."""
        return np.bincount(self.column, weights, minlength=self.count)

    def distance(self, weights: np.ndarray, free: np.ndarray | None = None) -> Distance:
        """From the update that these weights would give.

        Args:
            weights: of the columns, shape (columns,).
            free: columns that may have any weight, shape (columns,), bool.
        """
        if self.signs:
            return self._by_signs(weights)
        if self.empty:
            return Distance(0.0 if weights @ self._gram @ weights <= 0 else np.inf)
        any_weight = np.zeros(self.count, bool) if free is None else free.copy()
        any_weight[self.count - self._loose :] = True
        basis = np.eye(self.count)[any_weight]
        if not self.sized:
            basis = np.concatenate([weights[None], basis])
            weights = np.zeros(self.count)
        right = self._right - self._gram @ weights
        rest = self._size - weights @ (self._right + right)
        factor = 1.0
        if len(basis):
            towards = basis @ right
            found = np.linalg.lstsq(basis @ self._gram @ basis.T, towards, rcond=1e-13)[0]
            rest -= towards @ found
            if not self.sized:
                factor = float(found[0])
                if factor <= 0:
                    return Distance(np.inf, factor)
        return Distance(float(np.sqrt(max(rest, 0.0) / self._size)), factor)

    def scale(self, weights: np.ndarray) -> float:
        """The factor of some weights of the columns that brings them nearest to the update; 0: they are all zero."""
        if self.signs:
            return 1.0
        size = float(weights @ self._gram @ weights)
        return float(weights @ self._right) / size if size > 0 else 0.0

    def solve(self, basis: np.ndarray) -> np.ndarray:
        """Factors of some weights of the columns, shape (factors, columns), that come nearest to the update."""
        return np.linalg.lstsq(basis @ self._gram @ basis.T, basis @ self._right, rcond=1e-13)[0]

    def moments(self, fixed: np.ndarray, vary: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Normal equations of update = fixed (times a factor, where the size is not known) + x * vary, in shares.

        Returns:
            matrix and right side; the unknowns are x, or the factor and then the factor times x.
        """
        basis = vary[None] if self.sized else np.stack([fixed, vary])
        right = self._right - (self._gram @ fixed if self.sized else 0.0)
        size = self._size or 1.0
        return basis @ self._gram @ basis.T / size, basis @ right / size

    def _by_signs(self, weights: np.ndarray) -> Distance:
        assert self._columns is not None and self._update is not None
        used = np.abs(self._update) > SHORT * step_size(self._update)
        predicted = (weights @ self._columns)[used]
        large = np.abs(predicted) > NEGLIGIBLE[self._precision] * np.sqrt((predicted**2).mean())
        if not large.any():
            return Distance(np.inf)
        return Distance(float((np.sign(predicted[large]) != np.sign(self._update[used][large])).mean()))

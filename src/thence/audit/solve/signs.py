"""Recover token weights from the signs of an update alone: for Adam as people run it.

The first update of Adam with its usual epsilon is lr * g / (|g| + 1e-8): a step of the same size in every parameter,
and nothing but the sign of each gradient coordinate is left. That is one linear inequality on the token weights per
parameter, tens of thousands of them for a few hundred unknowns, so the weights are determined up to their scale to
about a hundredth. Neither the learning rate nor gradient clipping nor decoupled weight decay matters.
"""

from __future__ import annotations

import numpy as np

from thence.audit.solve.recover import Fit, LeastSquares

ALIKE = 0.9
"""An update is taken for one of signs if that share of its entries is about as large as the largest."""
FLOOR = 2e-2
"""Relative error of weights recovered from signs, for means over a response."""
TOKEN_ERROR = 1e-2
"""Standard error of one token's weight, in units of the mean weight, as measured on the probe."""
WRONG = 2e-3
"""Share of signs that rounding may turn."""
SHORT = 0.7
"""A step shorter than this share of the usual one is not used."""
NEGLIGIBLE = 1e-3
"""Gradients below this share of their root mean square may have any sign."""
_STEPS = 30


def step_size(change: np.ndarray) -> float:
    """How far Adam moved the parameters that had a gradient; rows that only decay move far less and are passed over."""
    size = np.abs(change)
    return float(np.median(size[size > 0.05 * size.max()]))


def looks_like_signs(change: np.ndarray) -> bool:
    """Whether nearly all entries that changed did so by the same amount."""
    size = np.abs(change)
    if not size.any():
        return False
    size = size[size > 0.05 * size.max()]
    return bool((np.abs(size / np.median(size) - 1) < 0.2).mean() > ALIKE)


class SignRegression:
    """Columns, and the weights whose combination has the signs of an update; the interface of ``LeastSquares``.

    Logistic regression through the origin on rows scaled to norm one, with a ridge that shrinks step by step, so that
    the solution moves from the mean direction into the middle of the cone of weights that agree with all signs.

    Args:
        columns: shape (columns, coordinates), float64.
    """

    def __init__(self, columns: np.ndarray):
        self.columns = columns
        linear = LeastSquares(columns)
        self.condition, self.undetermined = linear.condition, linear.undetermined
        self._norms = np.linalg.norm(columns, axis=0)

    def solve(self, update: np.ndarray) -> Fit:
        """Weights up to a factor; the residual is the share of signs that they get wrong.

        Args:
            update: change of the parameters, shape (coordinates,).
        """
        # Where the gradient is not far above Adam's epsilon the step is shorter, and rounding decides the sign.
        used = (self._norms > 0) & (np.abs(update) > SHORT * step_size(update))
        rows = (self.columns[:, used] / self._norms[used] * np.sign(update[used])).T
        weights = np.linalg.lstsq(rows.T @ rows, rows.sum(0), rcond=None)[0]
        ridge = 0.1
        for step in range(_STEPS):
            # The first steps only have to find the neighbourhood: a part of the rows does.
            part = rows[:: 5 if step < _STEPS - 8 else 1]
            wrong = 1 / (1 + np.exp(np.clip(part @ weights, -500, 500)))
            slope = ridge * weights - part.T @ wrong / len(part)
            bent = part[wrong * (1 - wrong) > 1e-12]
            curve = (wrong * (1 - wrong))[wrong * (1 - wrong) > 1e-12]
            bend = (bent * curve[:, None]).T @ bent / len(part) + ridge * np.eye(len(weights))
            weights = weights - np.linalg.solve(bend, slope)
            ridge = max(ridge / 2, 1e-9)
        predicted = (rows @ weights) * self._norms[used]
        large = np.abs(predicted) > NEGLIGIBLE * np.sqrt((predicted**2).mean())
        residual = float((predicted[large] <= 0).mean()) if large.any() else 1.0
        errors = np.full(len(weights), TOKEN_ERROR * np.sqrt((weights**2).mean()))
        return Fit(weights, errors, residual, self.condition, self.undetermined)

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
SIGN_ERROR = 3.0
"""Standard error of a weight recovered from signs: so many times the number of weights over that of signs, in units of
the mean weight. 1e-2 for the 130 tokens and 28,832 parameters of the probe."""
WRONG = {"float32": 2e-3, "bfloat16": 6e-3, "autocast": 6e-3}
"""Share of signs that rounding may turn, by precision."""
RULE_ERROR = 5e-3
"""Standard error of weights that predict all but ``WRONG`` of the signs: turning a gradient by an angle turns that
angle over pi of the signs."""
COARSE = 0.15
"""With a larger standard error of a token's weight, weights of whole sequences are sought."""
FEWEST = 200
"""Fewer signs than that say nothing."""
SHORT = 0.7
"""A step shorter than this share of the usual one is not used."""
NEGLIGIBLE = {"float32": 1e-3, "bfloat16": 3e-2, "autocast": 3e-2}
"""Gradients below this share of their root mean square may have any sign, by precision."""
_STEPS = 30
_HALVINGS = 20


def step_size(change: np.ndarray, spacing: np.ndarray | None = None) -> float:
    """How far Adam moved the parameters that had a gradient; rows that only decay move far less and are passed over.

    Args:
        change: of the parameters, shape (coordinates,).
        spacing: of the stored numbers, shaped alike; None: fine enough to be left out.
    """
    size, _ = _moved(change, spacing)
    return float(np.median(size)) if len(size) else 0.0


def looks_like_signs(change: np.ndarray, spacing: np.ndarray | None = None) -> bool:
    """Whether nearly all entries that changed did so by the same amount, or by that amount as it could be stored.

    Args:
        Others: see :func:`step_size`.
    """
    size, fine = _moved(change, spacing)
    if not len(size) or (spacing is not None and len(size) < FEWEST):
        return False
    allowed = 0.2 * np.median(size) + (0.0 if fine is None else 0.6 * fine)
    return bool((np.abs(size - np.median(size)) < allowed).mean() > ALIKE)


def _moved(change: np.ndarray, spacing: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Sizes of the moves that are no mere decay and are finer than their storage, and that of the storage."""
    size = np.abs(change)
    if not size.any():
        return size[:0], None
    moved = size > 0.05 * size.max()
    if spacing is None:
        return size[moved], None
    # A coarsely stored number moves by a whole spacing or not at all, whatever moved it.
    moved = (size > 0) & (spacing <= 0.5 * size)
    moved &= size > 0.05 * size[moved].max() if moved.any() else moved
    return size[moved], spacing[moved]


def wrong_share(predicted: np.ndarray, update: np.ndarray, precision: str = "float32") -> float:
    """Share of the signs of an update that a predicted gradient gets wrong; 0.5 where there are too few to tell.

    Args:
        predicted, update: shape (coordinates,); coordinates without an update are not counted.
    """
    moved = update != 0
    size = np.sqrt((predicted[moved] ** 2).mean()) if moved.any() else 0.0
    large = moved & (np.abs(predicted) > NEGLIGIBLE[precision] * size)
    if large.sum() < FEWEST:
        return 0.5
    return float((np.sign(predicted[large]) != np.sign(update[large])).mean())


def sign_error(weights: int, update: np.ndarray) -> float:
    """Standard error, in units of their mean, of so many weights recovered from the signs of an update."""
    return SIGN_ERROR * weights / max(int(np.count_nonzero(update)), 1)


class SignRegression:
    """Columns, and the weights whose combination has the signs of an update; the interface of ``LeastSquares``.

    Logistic regression through the origin on rows scaled to norm one, with a ridge that shrinks step by step, so that
    the solution moves from the mean direction into the middle of the cone of weights that agree with all signs.
    Newton steps are shortened until they lower the loss: with few signs for many weights a whole one leads astray.

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
        if not len(rows):
            return self._fit(np.zeros(len(self.columns)), 1.0, 1.0)
        weights = np.linalg.lstsq(rows.T @ rows, rows.sum(0), rcond=None)[0]
        ridge = 0.1
        for step in range(_STEPS):
            # The first steps only have to find the neighbourhood: a part of the rows does.
            part = rows[:: 5 if step < _STEPS - 8 and len(rows) > 50 * len(weights) else 1]
            weights = _newton(part, weights, ridge)
            ridge = max(ridge / 2, 1e-9)
        predicted = (rows @ weights) * self._norms[used]
        large = np.abs(predicted) > NEGLIGIBLE["float32"] * np.sqrt((predicted**2).mean())
        residual = float((predicted[large] <= 0).mean()) if large.any() else 1.0
        return self._fit(weights, residual, sign_error(len(weights), update[used]))

    def predicted(self, weights: np.ndarray, update: np.ndarray, precision: str = "float32") -> Fit:
        """The fit of given weights; the residual is the share of signs that they get wrong.

        Args:
            weights: of the columns, shape (columns,).
        """
        used = np.where(np.abs(update) > SHORT * step_size(update), update, 0.0)
        error = RULE_ERROR + 5.0 / max(int(np.count_nonzero(used)), 1)
        return self._fit(weights, wrong_share(weights @ self.columns, used, precision), error)

    def _fit(self, weights: np.ndarray, residual: float, error: float) -> Fit:
        errors = np.full(len(weights), error * np.sqrt((weights**2).mean()))
        return Fit(weights, errors, residual, self.condition, self.undetermined)


def _newton(rows: np.ndarray, weights: np.ndarray, ridge: float) -> np.ndarray:
    """One Newton step of ridge logistic regression, halved until the loss falls."""

    def loss(at: np.ndarray) -> float:
        return float(np.logaddexp(0.0, -(rows @ at)).mean() + ridge / 2 * (at @ at))

    wrong = 1 / (1 + np.exp(np.clip(rows @ weights, -500, 500)))
    curve = wrong * (1 - wrong)
    bent = curve > 1e-12
    slope = ridge * weights - rows.T @ wrong / len(rows)
    bend = (rows[bent] * curve[bent, None]).T @ rows[bent] / len(rows) + ridge * np.eye(len(weights))
    move, now = np.linalg.solve(bend, slope), loss(weights)
    for _ in range(_HALVINGS):
        if loss(weights - move) <= now:
            return weights - move
        move = move / 2
    return weights

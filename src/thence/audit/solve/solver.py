"""Solve one update for its token weights: lay out the gradients of the targets as columns, and fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from thence.audit.result import RESPONSE_ROLES, Role
from thence.audit.solve.gradients import Differentiator, TokenGradients, probability_features
from thence.audit.solve.observation import ForwardRow
from thence.audit.solve.recover import Fit, LeastSquares
from thence.audit.solve.sequences import Piece
from thence.audit.solve.signs import COARSE, SignRegression, sign_error


@dataclass(frozen=True)
class Target:
    """A target token of a piece.

    Args:
        piece: index in the step's pieces; -1: padding.
        place: of the target in the piece's ids.
        role: what it is.
        column: of the linear system; targets with the same context and token share one.
    """

    piece: int
    place: int
    role: Role
    column: int


@dataclass(frozen=True)
class DesignMatrix:
    """The columns of one step.

    Args:
        targets: target tokens, padding last.
        columns: gradients, shape (columns, coordinates), float64.
        shared: targets per column, shape (columns,).
        features: what token-dependent weights may depend on, by name, shape (targets,).
        uniform: gradients of label smoothing, shaped like ``columns``; None: not asked for.
    """

    targets: list[Target]
    columns: np.ndarray
    shared: np.ndarray
    features: dict[str, np.ndarray]
    uniform: np.ndarray | None = None

    def of_responses(self, weights: np.ndarray) -> np.ndarray:
        """Weights of the columns if every response token has that of its piece, shape (columns,).

        Args:
            weights: shape (pieces,).
        """
        result = np.zeros(len(self.columns))
        for target in self.targets:
            if target.role in RESPONSE_ROLES and target.piece >= 0:
                result[target.column] += weights[target.piece]
        return result

    def by_piece(self, pieces: int) -> np.ndarray:
        """Gradient of each piece's response as a whole, shape (pieces, coordinates)."""
        sums = np.zeros((pieces, self.columns.shape[1]))
        for target in self.targets:
            if target.role in RESPONSE_ROLES and target.piece >= 0:
                sums[target.piece] += self.columns[target.column]
        return sums


@dataclass(frozen=True)
class ObservedUpdate:
    """The update of one optimizer step, and what is known about it.

    Args:
        gradient: that the optimizer was given, shape (coordinates,); for signs the change of the parameters.
        pieces: the examples of the step.
        rows: as they went forward, for padding and packing; empty where nothing was watched.
        tolerance: largest residual of a fit, relative to the norm of the gradient (for signs: share of wrong ones).
        earlier: gradients of earlier steps, latest first, each of shape (coordinates,).
        before: the parameters before the step, shape (coordinates,).
        smoothing: label smoothing asked for, a share.
        ranks: that share the step.
        clip: largest norm of the gradient; 0: no clipping.
        rules: weights of the response tokens of each piece under the rules with a name, each of shape (pieces,), the
            rule asked for first. Signs are held against these before any weights are sought.
        precision: of the arithmetic, a key of ``signs.WRONG``.
    """

    gradient: np.ndarray
    pieces: Sequence[Piece]
    rows: Sequence[ForwardRow]
    tolerance: float
    earlier: Sequence[np.ndarray]
    before: np.ndarray
    smoothing: float = 0.0
    ranks: int = 1
    clip: float = 0.0
    rules: Sequence[np.ndarray] = ()
    precision: str = "float32"


@dataclass(frozen=True)
class Explanation:
    """A fit, and what had to be assumed for it.

    Args:
        design: the columns.
        fit: its weights, extras last.
        weights: of every target, shape (targets,).
        errors: standard errors of the weights, shape (targets,).
        residual_sequences: residual of the fit with one weight per sequence.
        fits: whether the residual is within the tolerance.
        assumed: finding ids: what the fit needed beyond weights of the tokens (``leak``, ``labels-shifted`` ...).
        detail: on what was assumed.
        rule: number of the rule that gives these weights (:class:`ObservedUpdate`); -1: they were sought.
    """

    design: DesignMatrix
    fit: Fit
    weights: np.ndarray
    errors: np.ndarray
    residual_sequences: float
    fits: bool
    assumed: tuple[str, ...] = ()
    detail: str = ""
    rule: int = -1


class StepSolver:
    """Design matrices and fits for the steps of an audit; gradients at the same parameters are computed once.

    Args:
        differentiator: of the probe's model.
        regression: how weights are found: least squares, or signs alone.
    """

    def __init__(
        self, differentiator: Differentiator, regression: type[LeastSquares] | type[SignRegression] = LeastSquares
    ):
        self.differentiator, self.regression = differentiator, regression
        self._point: bytes | None = None
        self._gradients: dict[tuple, TokenGradients] = {}
        self._systems: dict[tuple, tuple[DesignMatrix, LeastSquares | SignRegression]] = {}

    def move_to(self, state: Mapping[str, Tensor]) -> None:
        """Move to the parameters of a snapshot; gradients at other ones are forgotten."""
        point = b"".join(state[name].double().numpy().tobytes() for name in self.differentiator.names)
        if point != self._point:
            self._point, self._gradients, self._systems = point, {}, {}
        # Always: solvers share the model, and another one may have moved it.
        self.differentiator.load(state)

    def trim(self) -> None:
        """Forget what only one step needed: a design matrix takes some 50 MB."""
        plain_rows = [item for item in self._gradients.items() if item[0][1:] == (0, False, None, None)]
        self._gradients, self._systems = dict(plain_rows[-12:]), dict(list(self._systems.items())[-1:])

    def token_gradients(
        self, ids: tuple[int, ...], shift: int = 0, uniform: bool = False, positions=None, mask=None
    ) -> TokenGradients:
        """:meth:`Differentiator.tokens`, computed once a row."""
        key = (ids, shift, uniform, positions, mask)
        if key not in self._gradients:
            self._gradients[key] = self.differentiator.tokens(
                ids, shift=shift, uniform=uniform, positions=positions, mask=mask
            )
        return self._gradients[key]

    def design(self, pieces: Sequence[Piece], shift: int = 0, uniform: bool = False) -> DesignMatrix:
        """Every target of the pieces with its gradient.

        Args:
            shift: of the labels, see :meth:`Differentiator.tokens`.
            uniform: also the gradients of label smoothing.
        """
        column_of: dict[tuple, int] = {}
        targets, columns, smooth, features = [], [], [], []
        names: list[str] = []
        for index, piece in enumerate(pieces):
            tokens = self.token_gradients(piece.ids, shift, uniform)
            by_name = probability_features(tokens)
            names = list(by_name)
            for place in range(1, len(piece.ids)):
                key = piece.ids[: place + 1] if not shift else piece.ids
                key = (*key, place)
                if key not in column_of:
                    column_of[key] = len(columns)
                    columns.append(tokens.gradients[place - 1])
                    if tokens.uniform is not None:
                        smooth.append(tokens.uniform[place - 1])
                targets.append(Target(index, place, piece.roles[place], column_of[key]))
                features.append([by_name[name][place - 1] for name in by_name])
        return DesignMatrix(
            targets,
            np.stack(columns),
            np.bincount([t.column for t in targets], minlength=len(columns)),
            dict(zip(names, np.array(features).T, strict=True)),
            np.stack(smooth) if smooth else None,
        )

    def system(
        self, pieces: Sequence[Piece], smoothing: float = 0.0, shift: int = 0
    ) -> tuple[DesignMatrix, LeastSquares | SignRegression]:
        """The design with the label smoothing asked for, ready to be solved; kept for further updates."""
        key = (tuple((p.ids, p.roles) for p in pieces), shift, smoothing)
        if key not in self._systems:
            design = self.design(pieces, shift, bool(smoothing))
            if smoothing and design.uniform is not None:
                columns = (1 - smoothing) * design.columns + smoothing * design.uniform
                design = DesignMatrix(design.targets, columns, design.shared, design.features, design.uniform)
            self._systems[key] = (design, self.regression(design.columns))
        return self._systems[key]

    def plain(self, update: ObservedUpdate, shift: int = 0) -> Explanation:
        """The update as weights of its tokens alone.

        Signs are held against the named rules first. Too few signs for a weight a token give a weight a sequence.
        """
        design, system = self.system(update.pieces, 0.0 if shift else update.smoothing, shift)
        if not isinstance(system, SignRegression):
            return self.explanation(design, system.solve(update.gradient), update)
        for number, rule in enumerate(update.rules):
            weights = design.of_responses(rule)
            fit = system.predicted(weights, update.gradient, update.precision)
            if fit.residual <= update.tolerance:
                return replace(self.explanation(design, fit, update), rule=number)
        if sign_error(len(design.columns), update.gradient) <= COARSE:
            return self.explanation(design, system.solve(update.gradient), update)
        sequences = SignRegression(design.by_piece(len(update.pieces)))
        fit = sequences.solve(update.gradient)
        return self.explanation(
            design,
            replace(
                fit,
                weights=design.of_responses(fit.weights),
                errors=np.full(len(design.columns), float(fit.errors.max())),
                undetermined=system.undetermined,
            ),
            update,
        )

    def explanation(
        self,
        design: DesignMatrix,
        fit: Fit,
        update: ObservedUpdate,
        assumed: tuple[str, ...] = (),
        detail: str = "",
    ) -> Explanation:
        """A fit over a design, its weights handed out to the targets; targets that share a column share its weight."""
        column = np.array([t.column for t in design.targets])
        shared = design.shared[column]
        return Explanation(
            design,
            fit,
            fit.weights[column] / shared,
            fit.errors[column] / shared,
            self.regression(design.by_piece(len(update.pieces))).solve(update.gradient).residual,
            fit.residual <= update.tolerance,
            assumed,
            detail,
        )

    def by_parameter(self, update: ObservedUpdate) -> dict[str, tuple[np.ndarray, float]]:
        """One weight per sequence, solved for each parameter tensor on its own: name -> weights (pieces,), residual.

        A fit that fails over all parameters can be exact per tensor, where an all-reduce was left out for some.
        """
        columns = self.design(update.pieces).by_piece(len(update.pieces))
        result = {}
        for name, block in self.differentiator.blocks():
            if block.stop - block.start < 4 * len(update.pieces) or not np.any(update.gradient[block]):
                continue
            fit = LeastSquares(columns[:, block]).solve(update.gradient[block])
            if not fit.undetermined.any():
                result[name] = (fit.weights, fit.residual)
        return result

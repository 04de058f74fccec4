"""Explain one update: lay out the columns, solve, and, where token weights alone do not fit, try what may be added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from thence.audit.result import RESPONSE_ROLES, Role
from thence.audit.solve.gradients import Differentiator, Tokens, probability_features
from thence.audit.solve.recover import Fit, System
from thence.audit.solve.sequences import ForwardRow, Piece
from thence.audit.solve.signs import SignSystem


@dataclass(frozen=True)
class Unit:
    """A target token of a piece.

    Args:
        piece: index in the step's pieces; -1: padding.
        place: of the target in the piece's ids.
        column: of the linear system; units with the same context and target share one.
    """

    piece: int
    place: int
    role: Role
    column: int


@dataclass
class Layout:
    """The columns of one step.

    Args:
        units: target tokens, padding last.
        columns: shape (columns, coordinates).
        shared: units per column.
        features: per unit, what token-dependent weights may depend on.
    """

    units: list[Unit]
    columns: np.ndarray
    shared: np.ndarray
    features: dict[str, np.ndarray]
    smooth: np.ndarray | None = None


@dataclass(frozen=True)
class Explanation:
    """A fit, and what had to be assumed for it.

    Args:
        layout: the columns.
        fit: its weights, extras last.
        weights: of every unit.
        errors: of every unit.
        assumed: finding ids: what the fit needed beyond weights of the tokens (``leak``, ``labels-shifted`` ...).
        extra: coefficients of what was added, by name.
        residual_sequences: of the fit with one weight per sequence.
        fits: whether the residual is within the tolerance.
        detail: on what was assumed.
    """

    layout: Layout
    fit: Fit
    weights: np.ndarray
    errors: np.ndarray
    residual_sequences: float
    fits: bool
    assumed: tuple[str, ...] = ()
    extra: dict[str, float] = field(default_factory=dict)
    detail: str = ""


class Explainer:
    """Columns and fits for the steps of an audit; gradients at the same parameters are computed once.

    Args:
        differentiator: of the probe's model.
        solver: how weights are found: least squares, or signs alone.
    """

    def __init__(self, differentiator: Differentiator, solver: type[System] | type[SignSystem] = System):
        self.differentiator, self.solver = differentiator, solver
        self._point: bytes | None = None
        self._cache: dict[tuple, Tokens] = {}
        self._systems: dict[tuple, tuple[Layout, System | SignSystem]] = {}

    def at(self, state: dict) -> None:
        """Move to other parameters."""
        point = b"".join(state[name].double().numpy().tobytes() for name in self.differentiator.names)
        if point != self._point:
            self._point, self._cache, self._systems = point, {}, {}
            self.differentiator.load(state)

    def explain(
        self,
        update: np.ndarray,
        pieces: Sequence[Piece],
        rows: Sequence[ForwardRow],
        *,
        tolerance: float,
        earlier: Sequence[np.ndarray] = (),
        decay: np.ndarray | None = None,
        smoothing: float = 0.0,
    ) -> Explanation:
        """The simplest explanation of an update that is within the tolerance, or the plain one that is not.

        Args:
            rows: as they went forward, for padding and packing; empty where nothing was watched.
            earlier: updates of earlier steps, latest first.
            decay: the parameters before the step.
            smoothing: label smoothing that was asked for.
        """
        # What only one step needed is not kept for the next: a layout takes some 50 MB.
        plain_rows = [item for item in self._cache.items() if item[0][1:] == (0, False, None, None)]
        self._cache, self._systems = dict(plain_rows[-12:]), dict(list(self._systems.items())[-1:])
        plain = self._plain(update, pieces, tolerance, smoothing)
        if plain.fits:
            return plain
        parameters = [] if decay is None else [decay]
        trials = [
            lambda: self._extras(update, pieces, tolerance, smoothing, earlier, "leak"),
            lambda: self._extras(update, pieces, tolerance, smoothing, parameters, "weight-decay"),
            lambda: self._padding(update, pieces, rows, tolerance),
            lambda: self._contaminated(update, pieces, rows, tolerance),
            lambda: self._shifted(update, pieces, tolerance, 1),
            lambda: self._shifted(update, pieces, tolerance, -1),
            lambda: self._smoothing(update, pieces, tolerance, smoothing),
        ]  # fmt: skip
        for trial in trials:
            found = trial()
            if found is not None and found.fits:
                return found
        return plain

    def by_parameter(self, update: np.ndarray, pieces: Sequence[Piece]) -> dict[str, tuple[np.ndarray, float]]:
        """One weight per sequence, solved for each parameter tensor on its own: name -> weights, residual.

        A fit that fails over all parameters can be exact per tensor, where an all-reduce was left out for some.
        """
        columns = self._sequences(self._layout(pieces, 0), len(pieces))
        result = {}
        for name, block in self.differentiator.blocks():
            if block.stop - block.start < 4 * len(pieces) or not np.any(update[block]):
                continue
            fit = System(columns[:, block]).solve(update[block])
            if not fit.undetermined.any():
                result[name] = (fit.weights, fit.residual)
        return result

    def _tokens(self, ids: tuple[int, ...], shift: int = 0, uniform: bool = False, positions=None, mask=None) -> Tokens:
        key = (ids, shift, uniform, positions, mask)
        if key not in self._cache:
            self._cache[key] = self.differentiator.tokens(
                ids, shift=shift, uniform=uniform, positions=positions, mask=mask
            )
        return self._cache[key]

    def _layout(self, pieces: Sequence[Piece], shift: int, smoothing: bool = False) -> Layout:
        column_of: dict[tuple, int] = {}
        units, columns, smooth, features = [], [], [], []
        names: list[str] = []
        for index, piece in enumerate(pieces):
            tokens = self._tokens(piece.ids, shift, smoothing)
            extra = probability_features(tokens)
            names = list(extra)
            for place in range(1, len(piece.ids)):
                key = piece.ids[: place + 1] if not shift else piece.ids
                key = (*key, place)
                if key not in column_of:
                    column_of[key] = len(columns)
                    columns.append(tokens.gradients[place - 1])
                    if tokens.uniform is not None:
                        smooth.append(tokens.uniform[place - 1])
                units.append(Unit(index, place, piece.roles[place], column_of[key]))
                features.append([extra[name][place - 1] for name in extra])
        table = np.array(features).T
        shared = np.bincount([u.column for u in units], minlength=len(columns))
        return Layout(
            units,
            np.stack(columns),
            shared,
            dict(zip(names, table, strict=True)),
            np.stack(smooth) if smooth else None,
        )

    def _system(self, pieces: Sequence[Piece], shift: int, smoothing: float) -> tuple[Layout, System | SignSystem]:
        key = (tuple((p.ids, p.roles) for p in pieces), shift, smoothing)
        if key not in self._systems:
            layout = self._layout(pieces, shift, bool(smoothing))
            columns = layout.columns
            if smoothing and layout.smooth is not None:
                columns = (1 - smoothing) * columns + smoothing * layout.smooth
                layout = Layout(layout.units, columns, layout.shared, layout.features, layout.smooth)
            self._systems[key] = (layout, self.solver(columns))
        return self._systems[key]

    def _plain(
        self, update: np.ndarray, pieces: Sequence[Piece], tolerance: float, smoothing: float, shift: int = 0
    ) -> Explanation:
        layout, system = self._system(pieces, shift, smoothing)
        return self._explanation(layout, system.solve(update), update, len(pieces), tolerance)

    def _explanation(
        self,
        layout: Layout,
        fit: Fit,
        update: np.ndarray,
        pieces: int,
        tolerance: float,
        assumed: tuple[str, ...] = (),
        extra: dict[str, float] | None = None,
        detail: str = "",
    ) -> Explanation:
        column = np.array([u.column for u in layout.units])
        shared = layout.shared[column]
        return Explanation(
            layout,
            fit,
            fit.weights[column] / shared,
            fit.errors[column] / shared,
            self.solver(self._sequences(layout, pieces)).solve(update).residual,
            fit.residual <= tolerance,
            assumed,
            extra or {},
            detail,
        )

    @staticmethod
    def _sequences(layout: Layout, pieces: int) -> np.ndarray:
        """Gradient of each piece's response as a whole, shape (pieces, coordinates)."""
        columns = np.zeros((pieces, layout.columns.shape[1]))
        for unit in layout.units:
            if unit.role in RESPONSE_ROLES and unit.piece >= 0:
                columns[unit.piece] += layout.columns[unit.column]
        return columns

    def _extras(self, update, pieces, tolerance, smoothing, extras: Sequence[np.ndarray], name: str):
        """Whole vectors beside the token gradients: updates of earlier steps, the parameters themselves."""
        if not extras or self.solver is SignSystem:
            return None
        layout, _ = self._system(pieces, 0, smoothing)
        fit = self.solver(np.concatenate([layout.columns, np.stack(extras)])).solve(update)
        values = fit.weights[len(layout.columns) :]
        if name == "leak":
            back = int(np.argmax(np.abs(values)))
            detail = f"{values[back]:.3g} times the update of {back + 1} step{'s' * (back > 0)} before is applied again"
        else:
            detail = f"the parameters themselves enter with factor {values[0]:.3g}"
        return self._explanation(layout, fit, update, len(pieces), tolerance, (name,), {name: float(values[0])}, detail)

    def _padding(self, update, pieces, rows: Sequence[ForwardRow], tolerance: float):
        """Padding behind the responses as targets, with padding masked from attention or not."""
        found = None
        for masked in (True, False):
            pads = []
            for row in rows:
                real = [t for t, m in enumerate(row.mask) if m]
                if not real or real[-1] + 1 == len(row.ids):
                    continue
                ids, mask = row.ids[real[0] :], row.mask[real[0] :]
                tokens = self._tokens(ids, mask=mask if masked else None)
                pads += [(tokens, t) for t in range(real[-1] + 1 - real[0], len(ids))]
            if not pads:
                return None
            layout, _ = self._system(pieces, 0, 0.0)
            start = len(layout.columns)
            columns = np.concatenate([layout.columns, np.stack([k.gradients[t - 1] for k, t in pads])])
            units = [*layout.units, *(Unit(-1, t, "padding", start + i) for i, (_, t) in enumerate(pads))]
            features = {
                name: np.concatenate([values, [probability_features(k)[name][t - 1] for k, t in pads]])
                for name, values in layout.features.items()
            }
            shared = np.concatenate([layout.shared, np.ones(len(pads), dtype=int)])
            wider = Layout(units, columns, shared, features)
            found = self._explanation(wider, self.solver(columns).solve(update), update, len(pieces), tolerance)
            if found.fits:
                return found
        return found

    def _contaminated(self, update, pieces: Sequence[Piece], rows: Sequence[ForwardRow], tolerance: float):
        """Every packed row as one long context, positions counting on or as they were."""
        by_row: dict[int, list[int]] = {}
        for index, piece in enumerate(pieces):
            by_row.setdefault(piece.row, []).append(index)
        if all(len(members) == 1 for members in by_row.values()):
            return None
        for counting in (True, False):
            gradients: dict[tuple[int, int], np.ndarray] = {}
            for row, members in by_row.items():
                ordered = sorted(members, key=lambda i: pieces[i].start)
                ids = tuple(token for i in ordered for token in pieces[i].ids)
                positions = tuple(t for i in ordered for t in range(len(pieces[i].ids)))
                if not counting and rows and rows[row].positions is None:
                    continue
                tokens = self._tokens(ids, positions=tuple(range(len(ids))) if counting else positions)
                at = 0
                for i in ordered:
                    for place in range(len(pieces[i].ids)):
                        if at + place > 0:
                            gradients[i, place] = tokens.gradients[at + place - 1]
                    at += len(pieces[i].ids)
            if not gradients:
                continue
            base = self._layout(pieces, 0)
            columns = np.stack([gradients[u.piece, u.place] for u in base.units])
            units = [Unit(u.piece, u.place, u.role, i) for i, u in enumerate(base.units)]
            layout = Layout(units, columns, np.ones(len(units), dtype=int), base.features)
            found = self._explanation(
                layout, self.solver(columns).solve(update), update, len(pieces), tolerance, ("contaminated",),
                detail="positions count on through the row" if counting else "positions begin again with each example",
            )  # fmt: skip
            if found.fits:
                return found
        return None

    def _shifted(self, update, pieces, tolerance: float, shift: int):
        found = self._plain(update, pieces, tolerance, 0.0, shift)
        detail = f"each place predicts the token {1 + shift} places on" if shift > 0 else "each place predicts itself"
        return Explanation(
            found.layout, found.fit, found.weights, found.errors, found.residual_sequences, found.fits,
            ("labels-shifted",), detail=detail,
        )  # fmt: skip

    def _smoothing(self, update, pieces, tolerance: float, asked: float):
        """Two weights a token: of its own gradient and of the uniform one."""
        layout = self._layout(pieces, 0, smoothing=True)
        if layout.smooth is None:
            return None
        fit = self.solver(np.concatenate([layout.columns, layout.smooth])).solve(update)
        size = len(layout.columns)
        own, smooth = fit.weights[:size].sum(), fit.weights[size:].sum()
        share = smooth / (own + smooth) if own + smooth else 0.0
        if self.solver is SignSystem and abs(share - asked) < 0.02:
            return None
        total = Fit(
            fit.weights[:size] + fit.weights[size:], fit.errors[:size] + fit.errors[size:], fit.residual,
            fit.condition, fit.undetermined,
        )  # fmt: skip
        return self._explanation(
            layout, total, update, len(pieces), tolerance, ("smoothing",), {"smoothing": float(share)},
            f"label smoothing {share:.3g} where {asked:g} was asked for",
        )  # fmt: skip

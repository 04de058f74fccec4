"""Explain one update: by weights of its tokens, and, where these alone do not fit, with what a fault would add."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from thence.audit.solve.gradients import TokenGradients, probability_features
from thence.audit.solve.observation import ForwardRow
from thence.audit.solve.parts import clipped_by_shard, scaled_by_parameter
from thence.audit.solve.recover import Fit
from thence.audit.solve.sequences import Piece
from thence.audit.solve.signs import SignRegression, wrong_share
from thence.audit.solve.solver import DesignMatrix, Explanation, ObservedUpdate, StepSolver, Target


def explain(solver: StepSolver, update: ObservedUpdate) -> Explanation:
    """The simplest explanation of an update that is within the tolerance, or the plain one that is not.

    Args:
        solver: at the parameters before the step (:meth:`StepSolver.move_to`).
    """
    solver.trim()
    plain = solver.plain(update)
    if plain.fits:
        return plain
    for alternative in ALTERNATIVES:
        found = alternative(solver, update)
        if found is not None and found.fits:
            return found
    return plain


def _leaked(solver: StepSolver, update: ObservedUpdate) -> Explanation | None:
    """The gradients of earlier steps beside those of the tokens."""
    found = _with_vectors(solver, update, update.earlier)
    if found is None:
        return None
    design, fit, factors = found
    back = int(np.argmax(np.abs(factors)))
    detail = f"{factors[back]:.3g} times the update of {back + 1} step{'s' * (back > 0)} before is applied again"
    return solver.explanation(design, fit, update, ("leak",), detail)


def _decayed(solver: StepSolver, update: ObservedUpdate) -> Explanation | None:
    """The parameters themselves beside the gradients of the tokens.

    Where signs alone are known, beside the gradient of a named rule: Adam's weight decay turns some of its signs.
    """
    if solver.regression is SignRegression:
        return _decayed_signs(solver, update)
    found = _with_vectors(solver, update, [update.before])
    if found is None:
        return None
    design, fit, (factor,) = found
    detail = f"the parameters themselves enter with factor {factor:.3g}"
    return solver.explanation(design, fit, update, ("weight-decay",), detail)


def _decayed_signs(solver: StepSolver, update: ObservedUpdate) -> Explanation | None:
    design, system = solver.system(update.pieces, update.smoothing)
    if not isinstance(system, SignRegression):
        return None
    for number, rule in enumerate(update.rules):
        weights = design.of_responses(rule)
        gradient = weights @ design.columns
        size = np.sqrt((gradient**2).mean() / max((update.before**2).mean(), 1e-30))
        tried = list(size * np.geomspace(1e-4, 10, 60))
        best, share = 0.0, 1.0
        for width in (0.2, 0.02, 2e-3):
            for factor in tried:
                wrong = wrong_share(gradient + factor * update.before, update.gradient, update.precision)
                best, share = (factor, wrong) if wrong < share else (best, share)
            tried = list(best * np.linspace(1 - width, 1 + width, 13))
        if share <= update.tolerance:
            fit = replace(system.predicted(weights, update.gradient, update.precision), residual=share)
            detail = f"the parameters themselves enter with factor {best:.3g}"
            return replace(solver.explanation(design, fit, update, ("weight-decay",), detail), rule=number)
    return None


def _with_vectors(
    solver: StepSolver, update: ObservedUpdate, vectors: Sequence[np.ndarray]
) -> tuple[DesignMatrix, Fit, np.ndarray] | None:
    """A fit with further columns, and their factors; None: nothing to add, or signs, which tell nothing of it."""
    if not vectors or solver.regression is SignRegression:
        return None
    design, _ = solver.system(update.pieces, update.smoothing)
    fit = solver.regression(np.concatenate([design.columns, np.stack(vectors)])).solve(update.gradient)
    return design, fit, fit.weights[len(design.columns) :]


def _padded(solver: StepSolver, update: ObservedUpdate) -> Explanation | None:
    """Padding behind the responses as targets, with padding masked from attention or not."""
    found = None
    for masked in (True, False):
        pads = [(tokens, t) for _, tokens, t in padding_targets(solver, update.rows, masked)]
        if not pads:
            return None
        design, _ = solver.system(update.pieces)
        start = len(design.columns)
        wider = DesignMatrix(
            [*design.targets, *(Target(-1, t, "padding", start + i) for i, (_, t) in enumerate(pads))],
            np.concatenate([design.columns, np.stack([tokens.gradients[t - 1] for tokens, t in pads])]),
            np.concatenate([design.shared, np.ones(len(pads), dtype=int)]),
            {
                name: np.concatenate([values, [probability_features(tokens)[name][t - 1] for tokens, t in pads]])
                for name, values in design.features.items()
            },
        )
        found = solver.explanation(wider, solver.regression(wider.columns).solve(update.gradient), update)
        if found.fits:
            return found
    return found


def padding_targets(
    solver: StepSolver, rows: Sequence[ForwardRow], masked: bool
) -> list[tuple[int, TokenGradients, int]]:
    """Every padding token behind a response: its row, the gradients of that row and its place among their targets + 1.

    Args:
        masked: whether padding is masked from attention.
    """
    pads: list[tuple[int, TokenGradients, int]] = []
    for index, row in enumerate(rows):
        real = [t for t, m in enumerate(row.mask) if m]
        if not real or real[-1] + 1 == len(row.ids):
            continue
        ids, mask = row.ids[real[0] :], row.mask[real[0] :]
        tokens = solver.token_gradients(ids, mask=mask if masked else None)
        pads += [(index, tokens, t) for t in range(real[-1] + 1 - real[0], len(ids))]
    return pads


def _contaminated(solver: StepSolver, update: ObservedUpdate) -> Explanation | None:
    """Every packed row as one long context, positions counting on or as they were."""
    by_row: dict[int, list[int]] = {}
    for index, piece in enumerate(update.pieces):
        by_row.setdefault(piece.row, []).append(index)
    if all(len(members) == 1 for members in by_row.values()):
        return None
    for counting in (True, False):
        # Rows without position ids went forward with positions that count on.
        packed = [r for r in by_row if counting or not update.rows or update.rows[r].positions is not None]
        gradients = _row_gradients(solver, update.pieces, [by_row[r] for r in packed], counting)
        if not gradients:
            continue
        base = solver.design(update.pieces)
        columns = np.stack([gradients[t.piece, t.place] for t in base.targets])
        targets = [replace(target, column=i) for i, target in enumerate(base.targets)]
        design = DesignMatrix(targets, columns, np.ones(len(targets), dtype=int), base.features)
        detail = "positions count on through the row" if counting else "positions begin again with each example"
        fit = solver.regression(columns).solve(update.gradient)
        found = solver.explanation(design, fit, update, ("contaminated",), detail)
        if found.fits:
            return found
    return None


def _row_gradients(
    solver: StepSolver, pieces: Sequence[Piece], rows: Sequence[Sequence[int]], counting: bool
) -> dict[tuple[int, int], np.ndarray]:
    """Gradient of every token in its packed row, by (piece, place); the first token of a row has none."""
    gradients: dict[tuple[int, int], np.ndarray] = {}
    for members in rows:
        ordered = sorted(members, key=lambda i: pieces[i].start)
        ids = tuple(token for i in ordered for token in pieces[i].ids)
        positions = tuple(t for i in ordered for t in range(len(pieces[i].ids)))
        tokens = solver.token_gradients(ids, positions=tuple(range(len(ids))) if counting else positions)
        places = [(i, place) for i in ordered for place in range(len(pieces[i].ids))]
        gradients |= dict(zip(places[1:], tokens.gradients, strict=True))
    return gradients


def _shifted(shift: int) -> Callable[[StepSolver, ObservedUpdate], Explanation]:
    """Labels shifted twice (1) or not at all (-1)."""
    detail = f"each place predicts the token {1 + shift} places on" if shift > 0 else "each place predicts itself"

    def alternative(solver: StepSolver, update: ObservedUpdate) -> Explanation:
        return replace(solver.plain(update, shift), assumed=("labels-shifted",), detail=detail)

    return alternative


def _smoothed(solver: StepSolver, update: ObservedUpdate) -> Explanation | None:
    """Two weights a token: of its own gradient and of the uniform one."""
    design = solver.design(update.pieces, uniform=True)
    if design.uniform is None:
        return None
    fit = solver.regression(np.concatenate([design.columns, design.uniform])).solve(update.gradient)
    size = len(design.columns)
    own, smooth = fit.weights[:size].sum(), fit.weights[size:].sum()
    share = smooth / (own + smooth) if own + smooth else 0.0
    if solver.regression is SignRegression and abs(share - update.smoothing) < 0.02:
        return None
    errors = fit.errors[:size] + fit.errors[size:]
    total = replace(fit, weights=fit.weights[:size] + fit.weights[size:], errors=errors)
    detail = f"label smoothing {share:.3g} where {update.smoothing:g} was asked for"
    return solver.explanation(design, total, update, ("smoothing",), detail)


ALTERNATIVES: tuple[Callable[[StepSolver, ObservedUpdate], Explanation | None], ...] = (
    _leaked, _decayed, _padded, _contaminated, _shifted(1), _shifted(-1), _smoothed,
    clipped_by_shard, scaled_by_parameter,
)  # fmt: skip
"""In the order in which they are tried."""

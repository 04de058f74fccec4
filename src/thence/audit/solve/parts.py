"""An update that is right but for its size, which differs from one part of the parameters to another.

Ranks that hold a part of every parameter each (FSDP) may clip it by a norm of their own; a divisor may be set for some
parameters and not for others. All parts then follow one set of token weights, each times a factor of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from thence.audit.solve.gradients import Differentiator
from thence.audit.solve.recover import LeastSquares
from thence.audit.solve.signs import SignRegression
from thence.audit.solve.solver import Explanation, ObservedUpdate, StepSolver

_ROUNDS = 12
"""Most turns of fitting weights, then factors."""
_SAME, _SAMPLED = 1e-3, 0.05
"""Norms and factors that differ by less count as equal; norms estimated from a sample of the coordinates."""


@dataclass(frozen=True)
class Parts:
    """The coordinates in parts.

    Args:
        of: part of every coordinate, shape (coordinates,).
        names: of the parts.
    """

    of: np.ndarray
    names: Sequence[str]


def clipped_by_shard(solver: StepSolver, update: ObservedUpdate) -> Explanation | None:
    """Every rank's part of the parameters has a factor of its own, as where each rank clips by the norm of its part.

    Parameters are taken to be cut as FSDP2 does: along their first dimension, into equal chunks.
    """
    for world in [n for n in range(update.ranks, 1, -1) if update.ranks % n == 0]:
        parts = shards(solver.differentiator, world)
        found = _scaled(solver, update, parts)
        if found is None:
            continue
        explanation, factors = found
        norms = _norms(solver.differentiator, update.gradient, parts)
        said = ", ".join(f"{factor:.3g}" for factor in factors / factors.max())
        scaled = f"the parts that {world} ranks hold of the parameters are scaled by {said}"
        exact = solver.differentiator.coordinates is None
        at_clip = np.abs(norms - update.clip) < (_SAME if exact else _SAMPLED) * update.clip
        whole = factors > (1 - _slack(update)) * factors.max()
        if (at_clip | (whole & (norms < update.clip))).all():
            detail = f"{scaled}: each was clipped to norm {update.clip:g} by itself"
            return replace(explanation, assumed=("clipped-by-shard",), detail=detail)
        return replace(explanation, assumed=("scale-by-shard",), detail=f"{scaled}, each by a factor of its own")
    return None


def scaled_by_parameter(solver: StepSolver, update: ObservedUpdate) -> Explanation | None:
    """Every parameter has a factor of its own, such as where a divisor is set for some modules alone."""
    blocks = solver.differentiator.blocks()
    of = np.zeros(len(update.gradient), dtype=int)
    for number, (_, block) in enumerate(blocks):
        of[block] = number
    found = _scaled(solver, update, Parts(of, [name for name, _ in blocks]))
    if found is None:
        return None
    explanation, factors = found
    other = np.abs(factors - 1) > _slack(update)
    names = [name for (name, _), differs in zip(blocks, other, strict=True) if differs]
    times = ", ".join(sorted({f"{factor:.3g}" for factor in factors[other]}))
    detail = (
        f"the update of {len(names)} of {len(blocks)} parameters ({', '.join(names[:3])}) is {times} times that of the "
        "others"
    )
    return replace(explanation, assumed=("scale-by-parameter",), detail=detail)


def shards(differentiator: Differentiator, world: int) -> Parts:
    """Which of so many ranks holds a coordinate: every parameter in ``torch.chunk`` s of its first dimension."""
    found = []
    for name in differentiator.names:
        shape = differentiator.model.get_parameter(name).shape
        rows = shape[0] if shape else 1
        row = np.arange(int(np.prod(shape))) // max(int(np.prod(shape[1:])), 1)
        found.append(row // -(-rows // world))
    of = np.concatenate(found)
    if differentiator.coordinates is not None:
        of = of[differentiator.coordinates.numpy()]
    return Parts(of, [f"rank {rank}" for rank in range(world)])


def _scaled(solver: StepSolver, update: ObservedUpdate, parts: Parts) -> tuple[Explanation, np.ndarray] | None:
    """One set of weights times a factor a part, shape (parts,); None: that is not what the update is.

    The factor that most coordinates have is 1. A part without any change is not looked at here.
    """
    if solver.regression is SignRegression:
        return None
    design, _ = solver.system(update.pieces, update.smoothing)
    present = np.unique(parts.of)
    sizes = np.bincount(parts.of, minlength=len(parts.names))
    largest = int(sizes.argmax())
    changed = np.bincount(parts.of, np.abs(update.gradient), minlength=len(parts.names))
    if len(present) < 2 or (changed[present] == 0).any() or sizes[largest] < 2 * len(design.columns):
        return None
    own = parts.of == largest
    fit, rest = LeastSquares(design.columns[:, own]).solve(update.gradient[own]), np.inf
    for _ in range(_ROUNDS):
        factors = _factors(fit.weights @ design.columns, update, parts, sizes)
        scaled = replace(design, columns=design.columns * factors[parts.of])
        fit = LeastSquares(scaled.columns).solve(update.gradient)
        if fit.residual <= update.tolerance:
            known = factors[present]
            apart = (known > 0).all() and np.ptp(known) > _slack(update) * known.max()
            return (solver.explanation(scaled, fit, update), factors) if apart else None
        if fit.residual > 0.9 * rest:
            return None
        rest = fit.residual
    return None


def _factors(predicted: np.ndarray, update: ObservedUpdate, parts: Parts, sizes: np.ndarray) -> np.ndarray:
    """The factor of every part that brings the predicted gradient nearest to the real one; most coordinates have 1."""
    against = np.bincount(parts.of, predicted * update.gradient, minlength=len(sizes))
    squares = np.bincount(parts.of, predicted**2, minlength=len(sizes))
    factors = against / np.where(squares > 0, squares, 1.0)
    alike = np.abs(factors[:, None] - factors[None, :]) < _slack(update) * np.abs(factors[None, :])
    usual = factors[int((alike * sizes[:, None]).sum(0).argmax())]
    return factors / usual if usual else factors


def _slack(update: ObservedUpdate) -> float:
    """Factors that differ by less may be equal: arithmetic in bfloat16 blurs them."""
    return max(_SAME, update.tolerance)


def _norms(differentiator: Differentiator, gradient: np.ndarray, parts: Parts) -> np.ndarray:
    """Norm of every part, shape (parts,); from a sample of the coordinates where not all were looked at."""
    size = sum(differentiator.model.get_parameter(name).numel() for name in differentiator.names)
    squares = np.bincount(parts.of, gradient**2, minlength=len(parts.names))
    return np.sqrt(squares * size / len(gradient))

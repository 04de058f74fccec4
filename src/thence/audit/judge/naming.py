"""Name the objective that the weights of a step give, and what keeps it from being exact."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from thence.audit.judge.weights import HALF, SIGMAS, StepWeights
from thence.audit.objectives import OBJECTIVES, StepRows
from thence.audit.result import Finding
from thence.audit.solve.solver import Explanation


@dataclass(frozen=True)
class PieceWeights:
    """The mean weights of the pieces of a step, each array of shape (pieces,).

    Args:
        rows: the pieces; their lengths are those of the tokens that take part in a normaliser.
        value: mean weight of the piece's tokens over the mean ideal weight; not a number where none is used.
        spread: largest deviation of a token from it, relative to the mean over all tokens.
        error: of the value, relative to the same.
        kept: pieces with a weight.
        dropped: pieces without one.
    """

    rows: StepRows
    value: np.ndarray
    spread: np.ndarray
    error: np.ndarray
    kept: np.ndarray
    dropped: np.ndarray


def name_objective(
    step: StepWeights, explanation: Explanation, findings: Collection[str]
) -> tuple[str | None, tuple[str, ...], list[Finding]]:
    """Name the objective of the response tokens: its key, others alike, and what keeps it from being exact.

    Args:
        findings: ids of what was found of the roles (``end-missing``, ``prompt-trained`` ...).
    """
    used = step.response.copy()
    for name, role in (("end-missing", "end"), ("first-missing", "first")):
        if name in findings:
            used &= step.role != role
    counted = used.copy()
    for name, role in (("prompt-trained", "prompt"), ("padding-trained", "padding"), ("after-trained", "after")):
        if name in findings:
            counted |= step.role == role
    alone = step.counted(used & ~step.mixed)
    used &= ~step.mixed | (alone[step.piece] == 0)
    pieces = _piece_weights(step, used, step.counted(counted).astype(float))
    if not pieces.kept.any():
        return None, (), []
    found = [_dropped(step, pieces)] if pieces.dropped.any() else []
    if (pieces.spread > pieces.error * 3)[pieces.kept].any():
        base, finding = _token_dependent(step, explanation, used & pieces.kept[np.maximum(step.piece, 0)])
        return base, (), [*found, finding]
    candidates = _candidates(pieces)
    if candidates:
        return candidates[0], tuple(candidates[1:]), found
    if step.varied:
        least, most = step.shown[used].min(), step.shown[used].max()
        detail = f"advantages are {least:.3g} to {most:.3g} times those asked for"
        return None, (), [*found, Finding("advantage", "fault", detail)]
    named = _repeated(step, pieces) or _grouped(step, pieces)
    if named is not None:
        return named[0], (), [*found, named[1]]
    return None, (), found


def _piece_weights(step: StepWeights, used: np.ndarray, lengths: np.ndarray) -> PieceWeights:
    """The mean weight of the used tokens of each piece."""
    size = len(step.pieces)
    value, spread, error = np.full(size, np.nan), np.zeros(size), np.zeros(size)
    weight, own = step.weights / step.mean_ideal, SIGMAS * step.errors / step.mean_ideal
    mean = max(float(np.abs(weight[used]).mean()) if used.any() else 0.0, 1e-12)
    for i in range(size):
        mask = used & (step.piece == i)
        if not mask.any():
            continue
        value[i] = weight[mask].mean()
        beyond = np.abs(weight[mask] - value[i]) - own[mask]
        spread[i] = max(0.0, float(beyond.max())) / max(mean, abs(value[i]))
        error[i] = step.floor + float(np.sqrt((own[mask] ** 2).sum())) / mask.sum() / mean
    tokens = step.counted(used)
    seen = tokens > 0
    typical = np.average(np.abs(value[seen]), weights=tokens[seen]) if seen.any() else 0.0
    kept = seen & (np.abs(value) > np.minimum(3 * error, HALF) * typical)
    return PieceWeights(replace(step.rows, lengths=lengths), value, spread, error, kept, seen & ~kept)


def _candidates(pieces: PieceWeights) -> list[str]:
    """Objectives whose weights are those of the kept pieces, up to a factor."""
    allowed = _allowed(pieces)
    return [
        name
        for name, objective in OBJECTIVES.items()
        if name != "constant-divisor" and _distance(objective.weights(pieces.rows), pieces) <= allowed
    ]


def _distance(expected: np.ndarray, pieces: PieceWeights) -> float:
    """Relative distance of expected weights from those of the pieces, up to a factor, long pieces counting more."""
    root = np.sqrt(pieces.rows.lengths[pieces.kept])
    a, b = expected[pieces.kept] * root, pieces.value[pieces.kept] * root
    if not (a @ a) or not (b @ b):
        return float("inf")
    return float(np.linalg.norm(b - a * (a @ b) / (a @ a)) / np.linalg.norm(b))


def _allowed(pieces: PieceWeights) -> float:
    """The distance that the errors of the weights allow."""
    lengths, value, error = (v[pieces.kept] for v in (pieces.rows.lengths, pieces.value, pieces.error))
    root = np.sqrt(lengths)
    size = np.maximum(np.abs(value), np.average(np.abs(value), weights=lengths))
    return float(np.linalg.norm(error * size * root) / np.linalg.norm(value * root)) + 1e-9


def _repeated(step: StepWeights, pieces: PieceWeights) -> tuple[str, Finding] | None:
    """Weights that are whole multiples of an objective's: examples counted more than once."""
    for name in ("token-mean", "sequence-mean"):
        times = pieces.value[pieces.kept] / OBJECTIVES[name].weights(pieces.rows)[pieces.kept]
        times = times / times.min()
        whole = np.round(times)
        far = np.abs(times - whole) > 3 * pieces.error[pieces.kept] * whole + 1e-3
        if whole.max() > 4 or whole.max() == whole.min() or far.any():
            continue
        which = [str(step.pieces[i].example + 1) for i in np.flatnonzero(pieces.kept)[whole > 1]]
        detail = f"examples {', '.join(which)} count {int(whole.max())} times"
        return name, Finding("double-counted", "fault", detail)
    return None


def _grouped(step: StepWeights, pieces: PieceWeights) -> tuple[str, Finding] | None:
    """Equal weights reveal groups; if every group adds up to the same total, it is a mean of their means.

    For trainers that deal rows to micro-batches in another order than the one assumed.
    """
    value, error = pieces.value, pieces.error
    groups: list[list[int]] = []
    for i in np.flatnonzero(pieces.kept):
        for group in groups:
            if abs(value[i] - value[group[0]]) <= 3 * max(error[i], error[group[0]]) * abs(value[group[0]]) + 1e-9:
                group.append(int(i))
                break
        else:
            groups.append([int(i)])
    if not 1 < len(groups) < pieces.kept.sum():
        return None
    totals = np.array([sum(value[i] * pieces.rows.lengths[i] for i in group) for group in groups])
    if np.abs(totals / totals.mean() - 1).max() > 3 * error[pieces.kept].max():
        return None
    said = "; ".join(", ".join(str(step.pieces[i].example + 1) for i in group) for group in groups)
    return "micro-batch-mean", Finding("grouping", "note", f"the groups, read from equal weights, are {said}")


def _dropped(step: StepWeights, pieces: PieceWeights) -> Finding:
    """Name the rows that did not arrive by their place in the step."""
    micro, rank, kept = step.rows.micro_batch, step.rows.rank, pieces.kept
    seen = kept | pieces.dropped
    lost = f"{step.lost:.0%} of the gradient was lost"
    if (micro >= 0).all():
        whole_ranks = ~np.isin(rank, np.unique(rank[pieces.dropped]))
        if whole_ranks.any() and len(np.unique(rank)) > 1 and (kept == (whole_ranks & seen)).all():
            return Finding("rank-missing", "fault", f"rows of some ranks arrived only: {lost}")
        first, last = micro == 0, micro == np.array([micro[rank == r].max() for r in rank])
        for name, words, expected in (
            ("first-only", "the first micro-batch", first),
            ("last-only", "the last micro-batch", last),
            ("first-and-last-only", "the first and the last micro-batch", first | last),
        ):
            if (kept == (expected & seen)).all():
                return Finding(name, "fault", f"only {words} of {int(micro.max()) + 1} arrived: {lost}")
    detail = f"{int(pieces.dropped.sum())} of {int(seen.sum())} rows have weight zero: {lost}"
    return Finding("rows-dropped", "fault", detail)


def _token_dependent(step: StepWeights, explanation: Explanation, used: np.ndarray) -> tuple[str | None, Finding]:
    """Weights that vary within a response: do they follow what the model itself says?"""
    lengths = np.maximum(step.counted(used), 1)
    best, name_of_best, base_of_best = np.inf, "", "token-mean"
    for base in ("token-mean", "sequence-mean"):
        scale = np.ones(len(step.pieces)) if base == "token-mean" else 1.0 / lengths
        for name, feature in explanation.design.features.items():
            a, b = feature[used] * scale[step.piece[used]], step.weights[used]
            rest = float(np.linalg.norm(b - a * (a @ b) / (a @ a)) / np.linalg.norm(b))
            if rest < best:
                best, name_of_best, base_of_best = rest, name, base
    relative = step.relative[used]
    detail = f"token weights run from {relative.min():.3g} to {relative.max():.3g} of their mean"
    exact = best < 10 * step.floor
    if exact:
        detail += f" and are proportional to the token's {name_of_best}"
    return (base_of_best if exact else None), Finding("token-dependent", "fault", detail)

"""Name the objective that the weights of a step give, and what keeps it from being exact."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from thence.audit.judge.dropped import dropped_rows, dropped_tokens, early_mask
from thence.audit.judge.weights import HALF, NOUGHT, SIGMAS, StepWeights
from thence.audit.objectives import OBJECTIVES, StepRows
from thence.audit.result import Finding
from thence.audit.solve.solver import Explanation

FOLLOWS = 0.9
"""Token weights follow a property of the model's prediction if they correlate with it at least so much."""


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


@dataclass(frozen=True)
class Named:
    """What the weights of a step are called.

    Args:
        objective: key of ``OBJECTIVES``, or None.
        alike: further ones that give the same weights.
        findings: what keeps the objective from being exact.
        instead: ids of findings of the roles that these findings say better.
    """

    objective: str | None = None
    alike: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    instead: frozenset[str] = frozenset()


def name_objective(
    step: StepWeights, explanation: Explanation, findings: Collection[str], texts: Sequence[str]
) -> Named:
    """Name the objective of the response tokens.

    Args:
        findings: ids of what was found of the roles (``end-missing``, ``prompt-trained`` ...).
        texts: of the tokens, by id.
    """
    shift = early_mask(step, findings)
    if shift is not None:
        used, counted = step.response & ~shift.lost, (step.response & ~shift.lost) | shift.trained
        left = frozenset(findings) - _SAID_BY_A_SHIFT
        return replace(_name(step, explanation, used, counted, left, texts, (shift.finding,)), instead=_SAID_BY_A_SHIFT)
    used = step.response.copy()
    for name, role in _ENDS:
        if name in findings:
            used &= step.role != role
    counted = used.copy()
    for name, role in (("prompt-trained", "prompt"), ("padding-trained", "padding"), ("after-trained", "after")):
        if name in findings:
            counted |= step.role == role
    return _name(step, explanation, used, counted, frozenset(findings), texts)


_ENDS = (("end-missing", "end"), ("first-missing", "first"))
_SAID_BY_A_SHIFT = frozenset({"prompt-trained", "end-missing", "first-missing"})


def _name(
    step: StepWeights,
    explanation: Explanation,
    used: np.ndarray,
    counted: np.ndarray,
    findings: frozenset[str],
    texts: Sequence[str],
    found: tuple[Finding, ...] = (),
) -> Named:
    """Name the objective of the used targets; ``counted`` are those that take part in a normaliser."""
    alone = step.counted(used & ~step.mixed)
    used = used & (~step.mixed | (alone[step.piece] == 0))
    pieces = _piece_weights(step, used, step.counted(counted).astype(float))
    if not pieces.kept.any():
        return Named(findings=found)
    instead: frozenset[str] = frozenset()
    lengths = [pieces.rows.lengths]
    if _uneven(pieces):
        split = _without_zeros(step, used, counted, pieces)
        if split is None:
            found += (dropped_rows(step, pieces.kept, pieces.dropped),) if pieces.dropped.any() else ()
            base, finding = _token_dependent(step, explanation, used & pieces.kept[np.maximum(step.piece, 0)])
            return Named(base, (), (*found, finding))
        lost, seen, pieces, rows = split
        roles = [role for name, role in _ENDS if name in findings]
        finding, by_place = dropped_tokens(step, lost, seen, np.isin(step.role, roles), texts)
        found, lengths = (*found, *rows, finding), [pieces.rows.lengths, *lengths]
        instead = frozenset(name for name, _ in _ENDS) if by_place else instead
    elif pieces.dropped.any():
        found += (dropped_rows(step, pieces.kept, pieces.dropped),)
    for each in lengths:
        candidates = _candidates(replace(pieces, rows=replace(pieces.rows, lengths=each)))
        if candidates:
            best = step.asked if step.asked in candidates else candidates[0]
            return Named(best, tuple(name for name in candidates if name != best), found, instead)
    if step.varied:
        least, most = step.shown[used].min(), step.shown[used].max()
        detail = f"advantages are {least:.3g} to {most:.3g} times those asked for"
        return Named(None, (), (*found, Finding("advantage", "fault", detail)), instead)
    named = _repeated(step, pieces) or _grouped(step, pieces)
    if named is not None:
        return Named(named[0], (), (*found, named[1]), instead)
    return Named(None, (), found, instead)


def _uneven(pieces: PieceWeights) -> bool:
    """Whether tokens of one response have different weights."""
    return bool((pieces.spread > pieces.error * 3)[pieces.kept].any())


def _without_zeros(
    step: StepWeights, used: np.ndarray, counted: np.ndarray, pieces: PieceWeights
) -> tuple[np.ndarray, np.ndarray, PieceWeights, tuple[Finding, ...]] | None:
    """The targets without weight, those looked at, the pieces without them and what is said of whole rows.

    None where the weights of a row are not all zero or all alike.
    """
    rows: tuple[Finding, ...] = ()
    seen = step.response & ((step.piece >= 0) & ~step.mixed | used)
    if pieces.dropped.any():
        finding = dropped_rows(step, pieces.kept, pieces.dropped)
        if finding.id != "rows-dropped":
            # Which micro-batches or ranks arrived is a matter of its own; the tokens are those of the others.
            rows, seen = (finding,), seen & pieces.kept[np.maximum(step.piece, 0)]
    lost = seen & step.nothing
    if not step.zero(lost) or not (seen & ~lost).any():
        return None
    again = _piece_weights(step, seen & ~lost, step.counted(counted & ~lost).astype(float))
    if _uneven(again) or again.dropped.any():
        return None
    return lost, seen, again, rows


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
    kept = seen & (np.abs(value) > np.minimum(error - (1 - NOUGHT) * step.floor, HALF) * typical)
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
        many = f"examples {', '.join(which)} count" if len(which) > 1 else f"example {which[0]} counts"
        detail = f"{many} {int(whole.max())} times"
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


def _token_dependent(step: StepWeights, explanation: Explanation, used: np.ndarray) -> tuple[str | None, Finding]:
    """Weights that vary within a response: do they follow what the model itself says?"""
    lengths = np.maximum(step.counted(used), 1)
    rests: dict[tuple[str, str], float] = {}
    for base in ("token-mean", "sequence-mean"):
        scale = np.ones(len(step.pieces)) if base == "token-mean" else 1.0 / lengths
        for name, feature in explanation.design.features.items():
            a, b = feature[used] * scale[step.piece[used]], step.weights[used]
            # Where all rows are equally long the two differ by nothing but rounding.
            handicap = 1.0 if base == "token-mean" else 2.0
            rests[base, name] = handicap * float(np.linalg.norm(b - a * (a @ b) / (a @ a)) / np.linalg.norm(b))
    base_of_best, name_of_best = min(rests, key=lambda key: rests[key])
    best = rests[base_of_best, name_of_best]
    relative = step.relative[used]
    detail = f"token weights run from {relative.min():.3g} to {relative.max():.3g} of their mean"
    exact = best < 10 * step.floor
    if exact:
        detail += f" and are proportional to the token's {name_of_best}"
    else:
        detail += _correlation(step, explanation, used)
    return (base_of_best if exact else None), Finding("token-dependent", "fault", detail)


def _correlation(step: StepWeights, explanation: Explanation, used: np.ndarray) -> str:
    """How far the weights follow the model's own predictions, in words."""
    relative = step.relative[used]
    found = {
        name: float(np.corrcoef(feature[used], relative)[0, 1])
        for name, feature in explanation.design.features.items()
        if np.ptp(feature[used]) > 0
    }
    name = max(found, key=lambda key: abs(found[key]), default="")
    if name and abs(found[name]) >= FOLLOWS and used.sum() >= 10:
        return f" and follow the token's {name} (correlation {found[name]:.2f})"
    return ", and do not follow the model's own probabilities"

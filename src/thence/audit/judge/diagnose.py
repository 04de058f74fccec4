"""From recovered weights to words: which objective do they amount to, and what is missing, doubled or too large?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from thence.audit.judge.objectives import OBJECTIVES, Window
from thence.audit.result import RESPONSE_ROLES, Finding, Role, SequenceWeights, StepResult, TokenWeight
from thence.audit.solve.sequences import Piece
from thence.audit.solve.solver import Explanation, Target

FLOORS = {"float32": 2e-3, "bfloat16": 6e-2, "autocast": 6e-2}
"""Relative errors of weights that rounding alone may cause, by precision; sampling errors come on top."""
SIGMAS = 6.0


@dataclass(frozen=True)
class AskedObjective:
    """What the settings ask of one step.

    Args:
        objective: a key of ``OBJECTIVES``.
        advantages: one factor a piece; ones for supervised training.
        accumulation: planned micro-batches of a rank.
        ranks: planned ranks.
        scale_known: whether the learning rate is known and nothing clips.
        longest: constant of a constant divisor, tokens; 0: not known.
    """

    objective: str
    advantages: np.ndarray
    accumulation: int
    ranks: int
    scale_known: bool
    longest: float = 0.0


def diagnose_step(
    index: int,
    explanation: Explanation,
    pieces: Sequence[Piece],
    asked: AskedObjective,
    texts: Sequence[str],
    floor: float,
) -> StepResult:
    """Judge one step whose explanation fits.

    Args:
        floor: relative error of weights that does not come from the residual (one of ``FLOORS``).
    """
    units = explanation.design.targets
    advantages = np.array([asked.advantages[u.piece] if u.piece >= 0 else 1.0 for u in units])
    weights, errors = explanation.weights / advantages, explanation.errors / np.abs(advantages)
    undetermined = explanation.fit.undetermined[[u.column for u in units]]
    table = _Table(units, pieces, weights, errors, floor, asked, undetermined)
    if (table.role == "after").any() and not table.zero(table.role == "after"):
        # A template's text behind the end token may be trained on purpose; then it counts like any other token.
        table = _Table(units, pieces, weights, errors, floor, asked, undetermined, (*RESPONSE_ROLES, "after"))
    findings = _assumed(explanation)
    objective: str | None = None
    alike: tuple[str, ...] = ()
    if "labels-shifted" not in explanation.assumed:
        # Under a shift the roles belong to the neighbours of the tokens that were trained, and name nothing.
        findings += _role_findings(table)
        objective, alike, shape = _objective(table, explanation, findings)
        findings += shape
    scale = table.scale if asked.scale_known else None
    if scale is not None and not any(f.id in _SCALE_IS_ELSEWHERE for f in findings):
        findings += _scale_findings(scale, table, asked)
    return StepResult(
        index=index,
        objective=objective,
        alike=alike,
        residual=explanation.fit.residual,
        residual_sequences=explanation.residual_sequences,
        condition=explanation.fit.condition,
        error=float(np.median(table.relative_error)),
        scale=scale,
        smallest=float(table.shown[table.response].min()),
        largest=float(table.shown[table.response].max()),
        lost=table.lost,
        roles=table.roles(),
        sequences=_sequences(table, pieces, texts),
        undetermined=int((undetermined & table.response).sum()),
        findings=tuple(findings),
    )


_SCALE_IS_ELSEWHERE = {
    "first-only", "last-only", "first-and-last-only", "rank-missing", "rows-dropped", "double-counted",
    "token-dependent", "advantage", "prompt-trained", "padding-trained", "labels-shifted", "end-missing",
    "first-missing",
}  # fmt: skip
"""Findings that change the sum of weights by themselves."""


class _Table:
    """The units of a step as arrays, with their ideal weights under the objective asked for."""

    def __init__(
        self,
        units: Sequence[Target],
        pieces: Sequence[Piece],
        weights: np.ndarray,
        errors: np.ndarray,
        floor: float,
        asked: AskedObjective,
        undetermined: np.ndarray,
        counted: tuple[Role, ...] = RESPONSE_ROLES,
    ):
        self.units, self.pieces, self.floor = units, pieces, floor
        self.varied = float(np.ptp(asked.advantages)) > 0
        self.piece = np.array([u.piece for u in units])
        self.role = np.array([u.role for u in units])
        self.response = np.isin(self.role, counted)
        lengths = np.array([sum(r in counted for r in p.roles[1:]) for p in pieces])
        self.window = self._window(lengths, asked)
        ideal = OBJECTIVES[asked.objective].weights(self.window)
        self.ideal = np.where(self.response, ideal[self.piece], 0.0)
        self.mean_ideal = float(ideal.mean())
        advantages = np.where(self.piece >= 0, asked.advantages[self.piece], 1.0)
        weights, errors, self.mixed = self._parted(weights, errors, advantages, undetermined)
        self.weights, self.errors = weights, errors
        reference = np.where(self.response, ideal[self.piece], self.mean_ideal)
        self.ratio = weights / reference
        self.error = SIGMAS * errors / reference + floor
        total = float(self.ideal[self.response].sum())
        self.scale = float(weights[self.response].sum()) / total
        self.relative = self.ratio / self.scale if abs(self.scale) > 1e-6 else self.ratio
        self.shown = self.ratio if asked.scale_known else self.relative
        self.relative_error = SIGMAS * errors / reference / max(abs(self.scale), 1e-6) + floor
        share = self.ideal[self.response] / total
        self.lost = float((share * np.clip(1 - self.relative[self.response], 0, None)).sum())

    def _parted(
        self, weights: np.ndarray, errors: np.ndarray, advantages: np.ndarray, undetermined: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens that cannot be told apart (same context and target, or gradients that depend on one another) get
        their share as the objective asked for would give it, and are marked: they do not help to name another."""
        column = np.array([u.column for u in self.units])
        units = np.bincount(column)[column]
        expected = self.ideal * advantages
        total, size = np.bincount(column, expected)[column], np.bincount(column, np.abs(expected))[column]
        shared = self.response & (units > 1)
        known = np.abs(total) > 1e-3 * size
        share = weights * advantages * units * self.ideal / np.where(known, total, 1.0)
        parted = np.where(shared, np.where(known, share, self.ideal), weights)
        errors = np.where(shared, errors * units, errors)
        return np.where(undetermined, self.ideal, parted), errors, shared | undetermined

    def _window(self, lengths: np.ndarray, asked: AskedObjective) -> Window:
        micro = np.array([-1 if p.micro_batch is None else p.micro_batch for p in self.pieces])
        rank = np.array([-1 if p.rank is None else p.rank for p in self.pieces])
        return Window(lengths, micro, rank, asked.longest)

    def roles(self) -> dict[str, float]:
        """Mean of the shown ratio by role."""
        return {str(role): float(self.shown[self.role == role].mean()) for role in dict.fromkeys(self.role.tolist())}

    def zero(self, mask: np.ndarray) -> bool:
        """Whether all units of a mask have no weight beside the largest ones."""
        size = max(float(np.abs(self.relative[self.response]).mean()), 1e-9)
        return bool(mask.any() and (np.abs(self.relative[mask]) < 2 * self.relative_error[mask] * max(size, 1)).all())

    def counted(self, mask: np.ndarray) -> np.ndarray:
        """Units of a mask per piece."""
        return np.bincount(self.piece[mask & (self.piece >= 0)], minlength=len(self.pieces))


def _assumed(explanation: Explanation) -> list[Finding]:
    kinds = {"weight-decay": "note"}
    return [Finding(name, kinds.get(name, "fault"), explanation.detail) for name in explanation.assumed]  # pyright: ignore


def _role_findings(table: _Table) -> list[Finding]:
    """Tokens that are trained and should not be, and the other way round."""
    findings = []
    for role, name, kind in (
        ("prompt", "prompt-trained", "fault"),
        ("padding", "padding-trained", "fault"),
        ("after", "after-trained", "note"),
    ):
        mask = table.role == role
        if mask.any() and not table.zero(mask):
            mean = float(np.abs(table.shown[mask]).mean())
            findings.append(Finding(name, kind, f"{role} tokens get {mean:.3g} times the weight of a response token"))  # pyright: ignore
    for role, name in (("end", "end-missing"), ("first", "first-missing")):
        mask, others = table.response & (table.role == role), table.response & (table.role != role)
        if mask.any() and table.zero(mask) and others.any() and not table.zero(others):
            findings.append(Finding(name, "fault", f"the {role} token of every response has weight zero"))
    return findings


def _objective(
    table: _Table, explanation: Explanation, findings: list[Finding]
) -> tuple[str | None, tuple[str, ...], list[Finding]]:
    """Name the objective of the response tokens: its key, others alike, and what keeps it from being exact."""
    names = {f.id for f in findings}
    used = table.response.copy()
    for name, role in (("end-missing", "end"), ("first-missing", "first")):
        if name in names:
            used &= table.role != role
    counted = used.copy()
    for name, role in (("prompt-trained", "prompt"), ("padding-trained", "padding"), ("after-trained", "after")):
        if name in names:
            counted |= table.role == role
    alone = table.counted(used & ~table.mixed)
    used &= ~table.mixed | (alone[table.piece] == 0)
    value, spread, error = _by_piece(table, used)
    found: list[Finding] = []
    seen = table.counted(used) > 0
    mean = np.average(np.abs(value[seen]), weights=table.counted(used)[seen]) if seen.any() else 0.0
    kept = seen & (np.abs(value) > 3 * error * mean)
    if not kept.any():
        return None, (), found
    if (seen & ~kept).any():
        found.append(_dropped(table, kept, seen))
    if (spread > error * 3)[kept].any():
        return _token_dependent(table, explanation, used & kept[np.maximum(table.piece, 0)], value, found)
    candidates = _candidates(table, counted, value, error, kept)
    if candidates:
        return candidates[0], tuple(candidates[1:]), found
    if table.varied:
        least, most = table.shown[used].min(), table.shown[used].max()
        detail = f"advantages are {least:.3g} to {most:.3g} times those asked for"
        return None, (), [*found, Finding("advantage", "fault", detail)]
    repeated = _repeated(table, counted, value, error, kept)
    if repeated is not None:
        return repeated[0], (), [*found, repeated[1]]
    grouped = _grouped(table, counted, value, error, kept)
    if grouped is not None:
        return grouped[0], (), [*found, grouped[1]]
    return None, (), found


def _by_piece(table: _Table, used: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each piece: mean weight, largest deviation of a token from it, error of the mean.

    Weights are in units of the mean ideal weight; deviations and errors are relative to the mean over all tokens.
    """
    size = len(table.pieces)
    value, spread, error = np.full(size, np.nan), np.zeros(size), np.zeros(size)
    unit, own = table.weights / table.mean_ideal, SIGMAS * table.errors / table.mean_ideal
    mean = max(float(np.abs(unit[used]).mean()) if used.any() else 0.0, 1e-12)
    for i in range(size):
        mask = used & (table.piece == i)
        if not mask.any():
            continue
        value[i] = unit[mask].mean()
        beyond = np.abs(unit[mask] - value[i]) - own[mask]
        spread[i] = max(0.0, float(beyond.max())) / max(mean, abs(value[i]))
        error[i] = table.floor + float(np.sqrt((own[mask] ** 2).sum())) / mask.sum() / mean
    return value, spread, error


def _candidates(
    table: _Table, counted: np.ndarray, value: np.ndarray, error: np.ndarray, kept: np.ndarray
) -> list[str]:
    """Objectives whose weights are those of the kept pieces, up to a factor."""
    lengths = table.counted(counted).astype(float)
    window = Window(lengths, table.window.micro_batch, table.window.rank, table.window.longest)
    result = []
    for name, objective in OBJECTIVES.items():
        if name == "constant-divisor":
            continue
        if _distance(objective.weights(window), value, lengths, kept) <= _allowed(value, error, lengths, kept):
            result.append(name)
    return result


def _distance(expected: np.ndarray, value: np.ndarray, lengths: np.ndarray, kept: np.ndarray) -> float:
    """Relative distance between two sets of weights per piece, up to a common factor, long pieces counting more."""
    root = np.sqrt(lengths[kept])
    a, b = expected[kept] * root, value[kept] * root
    if not (a @ a) or not (b @ b):
        return float("inf")
    return float(np.linalg.norm(b - a * (a @ b) / (a @ a)) / np.linalg.norm(b))


def _allowed(value: np.ndarray, error: np.ndarray, lengths: np.ndarray, kept: np.ndarray) -> float:
    root = np.sqrt(lengths[kept])
    size = np.maximum(np.abs(value[kept]), np.average(np.abs(value[kept]), weights=lengths[kept]))
    return float(np.linalg.norm(error[kept] * size * root) / np.linalg.norm(value[kept] * root)) + 1e-9


def _repeated(table: _Table, counted, value, error, kept) -> tuple[str, Finding] | None:
    """Weights that are whole multiples of an objective's: examples counted more than once."""
    lengths = table.counted(counted).astype(float)
    window = Window(lengths, table.window.micro_batch, table.window.rank)
    for name in dict.fromkeys(("token-mean", "sequence-mean")):
        expected = OBJECTIVES[name].weights(window)
        times = value[kept] / expected[kept]
        times = times / times.min()
        whole = np.round(times)
        if (
            whole.max() > 4
            or whole.max() == whole.min()
            or (np.abs(times - whole) > 3 * error[kept] * whole + 1e-3).any()
        ):
            continue
        which = [table.pieces[i].example + 1 for i in np.flatnonzero(kept)[whole > 1]]
        return name, Finding(
            "double-counted",
            "fault",
            f"examples {', '.join(map(str, which))} count {int(whole.max())} times",
        )
    return None


def _grouped(table: _Table, counted, value, error, kept) -> tuple[str, Finding] | None:
    """Equal weights reveal groups; if every group adds up to the same total, it is a mean of their means.

    For trainers that deal rows to micro-batches in another order than the one assumed.
    """
    lengths = table.counted(counted).astype(float)
    groups: list[list[int]] = []
    for i in np.flatnonzero(kept):
        for group in groups:
            if abs(value[i] - value[group[0]]) <= 3 * max(error[i], error[group[0]]) * abs(value[group[0]]) + 1e-9:
                group.append(int(i))
                break
        else:
            groups.append([int(i)])
    if not 1 < len(groups) < kept.sum():
        return None
    totals = np.array([sum(value[i] * lengths[i] for i in group) for group in groups])
    if np.abs(totals / totals.mean() - 1).max() > 3 * error[kept].max():
        return None
    said = "; ".join(", ".join(str(table.pieces[i].example + 1) for i in group) for group in groups)
    return "micro-batch-mean", Finding("grouping", "note", f"the groups, read from equal weights, are {said}")


def _dropped(table: _Table, kept: np.ndarray, seen: np.ndarray) -> Finding:
    """Name the rows that did not arrive by their place in the step."""
    micro, rank = table.window.micro_batch, table.window.rank
    n, of = int((seen & ~kept).sum()), int(seen.sum())
    lost = f"{table.lost:.0%} of the gradient was lost"
    if (micro >= 0).all():
        for name, words in (
            ("rank-missing", "rows of some ranks"),
            ("first-only", "the first micro-batch"),
            ("last-only", "the last micro-batch"),
            ("first-and-last-only", "the first and the last micro-batch"),
        ):
            if name == "rank-missing":
                expected = ~np.isin(rank, np.unique(rank[seen & ~kept]))
                if not expected.any() or len(np.unique(rank)) < 2:
                    continue
            else:
                last = np.array([micro[rank == r].max() for r in rank])
                first, end = micro == 0, micro == last
                expected = {"first-only": first, "last-only": end, "first-and-last-only": first | end}[name]
            if (kept == (expected & seen)).all():
                return Finding(
                    name,
                    "fault",
                    f"only {words} of {int(micro.max()) + 1} arrived: {lost}"
                    if name != "rank-missing"
                    else f"{words} arrived only: {lost}",
                )
    return Finding("rows-dropped", "fault", f"{n} of {of} rows have weight zero: {lost}")


def _token_dependent(table: _Table, explanation: Explanation, used, value, found):
    """Weights that vary within a response: do they follow what the model itself says?"""
    lengths = np.maximum(table.counted(used), 1)
    best, name_of_best, base_of_best = np.inf, "", "token-mean"
    for base in ("token-mean", "sequence-mean"):
        scale = np.ones(len(table.pieces)) if base == "token-mean" else 1.0 / lengths
        for name, feature in explanation.design.features.items():
            a, b = feature[used] * scale[table.piece[used]], table.weights[used]
            rest = float(np.linalg.norm(b - a * (a @ b) / (a @ a)) / np.linalg.norm(b))
            if rest < best:
                best, name_of_best, base_of_best = rest, name, base
    relative = table.relative[used]
    detail = f"token weights run from {relative.min():.3g} to {relative.max():.3g} of their mean"
    exact = best < 10 * table.floor
    if exact:
        detail += f" and are proportional to the token's {name_of_best}"
    found.append(Finding("token-dependent", "fault", detail))
    return (base_of_best if exact else None), (), found


def _scale_findings(scale: float, table: _Table, asked: AskedObjective) -> list[Finding]:
    """Is the sum of weights one, or off by a factor that has a name?"""
    tolerance = 4 * table.floor
    if asked.objective == "constant-divisor" and not asked.longest:
        return []
    if abs(scale - 1) <= tolerance:
        return []
    micro = table.window.micro_batch
    actual = int(micro.max()) + 1 if (micro >= 0).all() else asked.accumulation
    factors = [
        ("incomplete-window-scaled", actual / asked.accumulation, f"{actual} of {asked.accumulation} micro-batches"),
        ("scale-accumulation", float(actual), f"{actual} micro-batches"),
        ("scale-accumulation", 1.0 / actual, f"{actual} micro-batches"),
        ("scale-ranks", float(asked.ranks), f"{asked.ranks} ranks"),
        ("scale-ranks", 1.0 / asked.ranks, f"{asked.ranks} ranks"),
        ("scale-accumulation", float(actual * asked.ranks), f"{actual} micro-batches on {asked.ranks} ranks"),
    ]
    for name, factor, words in factors:
        if factor != 1 and abs(scale / factor - 1) <= tolerance:
            return [Finding(name, "fault", f"the update is {scale:.4g} times what it should be ({words})")]
    if table.varied:
        return [Finding("advantage", "fault", f"all advantages are {scale:.4g} times those asked for")]
    return [Finding("scale", "fault", f"the update is {scale:.4g} times what it should be")]


def _sequences(table: _Table, pieces: Sequence[Piece], texts: Sequence[str]) -> tuple[SequenceWeights, ...]:
    result = []
    for index, piece in enumerate(pieces):
        tokens = tuple(
            TokenWeight(
                texts[piece.ids[unit.place]] if piece.ids[unit.place] < len(texts) else "?",
                unit.role,
                float(table.weights[u]),
                float(table.ideal[u]),
                float(table.shown[u]),
            )
            for u, unit in enumerate(table.units)
            if unit.piece == index
        )
        response = [t.ratio for t in tokens if t.ideal]
        mean = float(np.mean(response)) if response else 0.0
        result.append(SequenceWeights(piece.example, piece.micro_batch, piece.rank, mean, tokens))
    return tuple(result)

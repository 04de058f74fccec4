"""From the recovered weights of a step to words: which objective they give, what is missing, doubled or too large?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from thence.audit.judge.naming import name_objective
from thence.audit.judge.weights import AskedObjective, StepWeights
from thence.audit.objectives import OBJECTIVES
from thence.audit.result import RESPONSE_ROLES, Case, Finding, SequenceWeights, StepResult, TokenWeight
from thence.audit.solve.sequences import Piece
from thence.audit.solve.solver import Explanation


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
        index: of the step, 1 for the first.
        texts: of the tokens, by id.
        floor: relative error of weights that does not come from the residual (one of ``FLOORS``).
    """
    step = StepWeights(explanation, pieces, asked, floor)
    if (step.role == "after").any() and not step.zero(step.role == "after"):
        # A template's text behind the end token may be trained on purpose; then it counts like any other token.
        step = StepWeights(explanation, pieces, asked, floor, (*RESPONSE_ROLES, "after"))
    findings = _assumed(explanation)
    objective: str | None = None
    alike: tuple[str, ...] = ()
    if "labels-shifted" not in explanation.assumed:
        # Under a shift the roles belong to the neighbours of the tokens that were trained, and name nothing.
        findings += _role_findings(step)
        named = name_objective(step, explanation, {f.id for f in findings}, texts)
        objective, alike = named.objective, named.alike
        findings = [*(f for f in findings if f.id not in named.instead), *named.findings]
    scale = step.scale if asked.scale_known else None
    if scale is not None and not any(f.id in _EXPLAIN_THE_SCALE for f in findings):
        findings += _scale_findings(scale, step, asked)
    if scale is None and step.scale < -1e-6:
        findings.append(Finding("against-gradient", "fault", "it makes the loss larger"))
    undetermined = explanation.fit.undetermined[[t.column for t in step.targets]]
    return StepResult(
        index=index,
        objective=objective,
        alike=alike,
        residual=explanation.fit.residual,
        residual_sequences=explanation.residual_sequences,
        condition=explanation.fit.condition,
        error=float(np.median(step.relative_error)),
        scale=scale,
        smallest=float(step.shown[step.response].min()),
        largest=float(step.shown[step.response].max()),
        lost=step.lost,
        roles=step.roles(),
        sequences=_sequences(step, pieces, texts),
        undetermined=int((undetermined & step.response).sum()),
        findings=tuple(findings),
    )


def objective_findings(case: Case, result: StepResult) -> list[Finding]:
    """Whether the objective is the one asked for."""
    if result.objective is None:
        if any(f.id in _SAY_THE_WEIGHTS for f in result.findings):
            return []
        detail = f"response tokens weigh from {result.smallest:.3g} to {result.largest:.3g} of what they should"
        return [Finding("unnamed", "fault", detail)]
    asked = {case.asked, *(("token-mean",) if case.asked == "constant-divisor" else ())}
    if asked & {result.objective, *result.alike}:
        choice = Finding(case.asked, "choice", f"the {OBJECTIVES[case.asked].title}, as asked for")
        return [] if case.asked == "token-mean" else [choice]
    if any(f.id == result.objective and f.kind == "fault" for f in result.findings):
        return []
    detail = f"response tokens weigh from {result.smallest:.3g} to {result.largest:.3g} of what they should"
    return [Finding(result.objective, "fault", detail)]


_SAY_THE_WEIGHTS = {"token-dependent", "advantage", "labels-shifted"}
"""Findings that say themselves why no objective gives the weights."""

_EXPLAIN_THE_SCALE = {
    "first-only", "last-only", "first-and-last-only", "all-but-first", "all-but-last", "rank-missing", "rows-dropped",
    "double-counted", "token-dependent", "tokens-dropped", "advantage", "prompt-trained", "padding-trained",
    "labels-shifted", "end-missing", "first-missing",
}  # fmt: skip
"""Findings that change the sum of weights by themselves."""


def _assumed(explanation: Explanation) -> list[Finding]:
    kinds = {"weight-decay": "note"}
    return [Finding(name, kinds.get(name, "fault"), explanation.detail) for name in explanation.assumed]  # pyright: ignore


def _role_findings(step: StepWeights) -> list[Finding]:
    """Tokens that are trained and should not be, and the other way round."""
    findings = []
    for role, name, kind in (
        ("prompt", "prompt-trained", "fault"),
        ("padding", "padding-trained", "fault"),
        ("after", "after-trained", "note"),
    ):
        mask = step.role == role
        if mask.any() and not step.zero(mask):
            mean = float(np.abs(step.shown[mask]).mean())
            findings.append(Finding(name, kind, f"{role} tokens get {mean:.3g} times the weight of a response token"))  # pyright: ignore
    for role, name in (("end", "end-missing"), ("first", "first-missing")):
        mask, others = step.response & (step.role == role), step.response & (step.role != role)
        if mask.any() and step.zero(mask) and others.any() and not step.zero(others):
            findings.append(Finding(name, "fault", f"the {role} token of every response has {step.zero_text(mask)}"))
    return findings


def _scale_findings(scale: float, step: StepWeights, asked: AskedObjective) -> list[Finding]:
    """Is the sum of weights one, or off by a factor that has a name?"""
    tolerance = 4 * step.floor
    if asked.objective == "constant-divisor" and not asked.longest:
        return []
    if abs(scale - 1) <= tolerance:
        return []
    micro = step.rows.micro_batch
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
    if step.varied:
        return [Finding("advantage", "fault", f"all advantages are {scale:.4g} times those asked for")]
    if scale < 0:
        return [Finding("against-gradient", "fault", f"the update is {scale:.4g} times what it should be")]
    return [Finding("scale", "fault", f"the update is {scale:.4g} times what it should be")]


def _sequences(step: StepWeights, pieces: Sequence[Piece], texts: Sequence[str]) -> tuple[SequenceWeights, ...]:
    result = []
    for index, piece in enumerate(pieces):
        tokens = tuple(
            TokenWeight(
                texts[piece.ids[target.place]] if piece.ids[target.place] < len(texts) else "?",
                target.role,
                float(step.weights[t]),
                float(step.ideal[t]),
                float(step.shown[t]),
            )
            for t, target in enumerate(step.targets)
            if target.piece == index
        )
        response = [token.ratio for token in tokens if token.ideal]
        mean = float(np.mean(response)) if response else 0.0
        result.append(SequenceWeights(piece.example, piece.micro_batch, piece.rank, mean, tokens))
    return tuple(result)

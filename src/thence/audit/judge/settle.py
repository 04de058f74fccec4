"""Names that one case leaves open, decided by the whole matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from thence.audit.judge.dropped import part_arrived
from thence.audit.objectives import OBJECTIVES
from thence.audit.result import RESPONSE_ROLES, CaseResult, Finding, StepResult


def settle(cases: Sequence[CaseResult], asked: str = "") -> list[CaseResult]:
    """Name every step after the one objective that agrees with all of them.

    A single case may fit several: with one row in a micro-batch, a mean of micro-batch means is a mean of sequence
    means. The whole matrix decides; where no rule fits all, the one that fits the most steps does. So it is with two
    micro-batches, where "only the last arrived" and "the first was lost" are one.
    """
    judged = [case for case in cases if case.status == "judged" and case.steps]
    if not judged:
        return list(cases)
    if scale_law(judged) in ("tokens", "rows"):
        # The update grows with the batch: what looks like a wrong scale, case by case, is a constant divisor.
        return [replace(case, steps=tuple(_constant(step, case.case.asked) for step in case.steps)) for case in cases]
    common = common_objective(judged, asked or judged[0].case.asked)
    rules = [common] if common is not None else _by_use(judged)
    named = [
        replace(case, steps=tuple(_settled(step, case.case.asked, rules) for step in case.steps)) for case in cases
    ]
    return _settle_parts(named)


def common_objective(judged: Sequence[CaseResult], asked: str) -> str | None:
    """The one objective that agrees with every judged step; the one asked for, if it is among them."""
    possible: set[str] | None = None
    for step in (step for case in judged for step in case.steps):
        if step.objective is None:
            return None
        own = {step.objective, *step.alike}
        possible = own if possible is None else possible & own
    if not possible:
        return None
    if asked in possible or (asked == "constant-divisor" and "token-mean" in possible):
        return asked
    return next(name for name in OBJECTIVES if name in possible)


def _constant(step: StepResult, asked: str) -> StepResult:
    if step.objective != "token-mean" or step.scale is None or asked == "constant-divisor":
        return step
    if step.scale < 0:
        return step  # against the gradient, and named so: no divisor is negative
    kept = [f for f in step.findings if not f.id.startswith("scale")]
    detail = f"the update is {step.scale:.4g} times that of a {OBJECTIVES[asked].title}"
    found = Finding("constant-divisor", "fault", detail)
    return replace(step, objective="constant-divisor", alike=(), findings=(*kept, found))


def _settled(step: StepResult, asked: str, rules: Sequence[str]) -> StepResult:
    """The step under the first of the rules that gives its weights; as it is where they may be as asked."""
    own = {step.objective, *step.alike} - {None}
    name = next((rule for rule in rules if rule in own), None)
    if step.objective is None or name is None or name == step.objective or (asked in own and len(rules) > 1):
        return step
    alike = tuple(other for other in (step.objective, *step.alike) if other != name)
    findings = tuple(replace(f, id=name) if f.id == step.objective else f for f in step.findings)
    return replace(step, objective=name, alike=alike, findings=findings)


def _by_use(judged: Sequence[CaseResult]) -> list[str]:
    """The rules of the steps that are not as asked, the one that gives the weights of most of them first."""
    times: Counter[str] = Counter()
    for case in judged:
        for step in case.steps:
            own = {step.objective, *step.alike} - {None}
            if case.case.asked not in own:
                times.update(name for name in OBJECTIVES if name in own)
    return [name for name, _ in times.most_common()]


def _settle_parts(cases: Sequence[CaseResult]) -> list[CaseResult]:
    """With two micro-batches "only the last" is "all but the first": a case with more decides for all."""
    result = list(cases)
    for narrow, wide in (("last-only", "all-but-first"), ("first-only", "all-but-last")):
        found = [(f.id, micro_batches(step)) for case in result for step in case.steps for f in step.findings]
        if any(name == wide for name, _ in found) and not any(name == narrow and n > 2 for name, n in found):
            result = [
                replace(case, steps=tuple(_renamed(step, narrow, wide) for step in case.steps)) for case in result
            ]
    return result


def _renamed(step: StepResult, old: str, new: str) -> StepResult:
    detail = part_arrived(new, micro_batches(step), step.lost)
    found = tuple(replace(f, id=new, detail=detail) if f.id == old else f for f in step.findings)
    return replace(step, findings=found)


def micro_batches(step: StepResult) -> int:
    """Micro-batches of a rank in a step; 0 where that is not known."""
    return max((-1 if row.micro_batch is None else row.micro_batch for row in step.sequences), default=-1) + 1


def scale_law(judged: Sequence[CaseResult]) -> str | None:
    """What the sum of weights follows over the cases where it is known: ``one``, ``tokens``, ``rows`` or nothing."""
    points = []
    for case in judged:
        for step in case.steps:
            if step.scale is not None and case.case.precision == "float32" and step.objective == "token-mean":
                tokens = sum(t.role in RESPONSE_ROLES for q in step.sequences for t in q.tokens)
                points.append((step.scale, tokens, tokens / max(len(step.sequences), 1)))
    if len({p[1] for p in points}) < 2:
        return None
    scale, tokens, mean_length = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    for name, expected in (("one", np.ones_like(scale)), ("tokens", tokens), ("rows", mean_length)):
        ratio = scale / expected
        if np.ptp(ratio) <= 0.01 * abs(ratio.mean()):
            return name
    return None

"""All cases together: one verdict, in two plain sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from thence.audit.judge.findings import CATALOGUE
from thence.audit.objectives import OBJECTIVES
from thence.audit.result import RESPONSE_ROLES, AuditVerdict, CaseResult, Finding, PublicReport, StepResult
from thence.known_faults import load_known_faults

_BY_SEVERITY = (
    "parameters-untouched", "no-step", "advantage-sign", "first-and-last-only", "first-only", "last-only",
    "rank-missing", "rows-dropped", "ranks-differ", "frozen-moved", "differs-by-parameter", "depends-on-cut",
    "labels-shifted", "contaminated", "micro-batch-mean", "rank-mean", "pass-mean", "sequence-mean",
    "micro-batch-sequence-mean", "constant-divisor", "token-dependent", "double-counted", "leak", "prompt-trained",
    "padding-trained", "end-missing", "first-missing", "window-mixed", "scale-by-parameter", "clipped-by-shard", "scale-by-shard",
    "incomplete-window-scaled", "scale-accumulation", "scale-ranks", "scale",
)  # fmt: skip
"""The order in which faults are named where there are several."""


_GRADIENT_LOST = {
    "first-and-last-only",
    "first-only",
    "last-only",
    "rank-missing",
    "rows-dropped",
    "end-missing",
    "first-missing",
}
_TURNED = {"clipped-by-shard", "scale-by-shard", "scale-by-parameter"}
"""Every token may have its weight; what differs is the size of the update from part to part."""


def judge_all(cases: Sequence[CaseResult], versions: Mapping[str, str], asked: str = "") -> AuditVerdict:
    """The verdict over a matrix.

    A fault in any case is a finding, also in a case whose weights could not be judged. A trainer is acquitted only if
    every case that the stack has was judged: an update that nobody can explain is no proof that it is right.

    Args:
        versions: of the audited stack, to look up public reports.
        asked: the objective asked for where cases differ; empty: that of the first judged case.
    """
    judged = [c for c in cases if c.status == "judged"]
    asked = asked or (judged[0].case.asked if judged else cases[0].case.asked if cases else "token-mean")
    faults = _faults(cases)
    objective = common_objective(judged, asked)
    if not faults and (not judged or len(judged) < len(_tried(cases))):
        return _no_verdict(cases, judged, objective, asked)
    if not faults:
        return _clean(cases, judged, objective, asked)
    ids = sorted(faults, key=lambda i: _BY_SEVERITY.index(i) if i in _BY_SEVERITY else len(_BY_SEVERITY))
    main = ids[0]
    hit = faults[main]
    worst = max(hit, key=lambda pair: _severity(pair[0]))
    return AuditVerdict(
        "finding",
        objective,
        asked,
        (_what(main, worst, hit, _tried(cases), asked), _means(main, worst[0], ids[1:], faults) + _law(judged)),
        " ".join(list(dict.fromkeys(CATALOGUE[i].remedy for i in ids))[:3]),
        public_reports(versions, ids),
    )


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


def settle(cases: Sequence[CaseResult], asked: str = "") -> list[CaseResult]:
    """Name every step after the one objective that agrees with all of them.

    A single case may fit several: with one row in a micro-batch, a mean of micro-batch means is a mean of sequence
    means. The whole matrix decides.
    """
    judged = [case for case in cases if case.status == "judged" and case.steps]
    if not judged:
        return list(cases)
    if scale_law(judged) in ("tokens", "rows"):
        # The update grows with the batch: what looks like a wrong scale, case by case, is a constant divisor.
        return [replace(case, steps=tuple(_constant(step, case.case.asked) for step in case.steps)) for case in cases]
    common = common_objective(judged, asked or judged[0].case.asked)
    if common is None:
        return list(cases)
    return [replace(case, steps=tuple(_settled(step, common) for step in case.steps)) for case in cases]


def _constant(step: StepResult, asked: str) -> StepResult:
    if step.objective != "token-mean" or step.scale is None or asked == "constant-divisor":
        return step
    kept = [f for f in step.findings if not f.id.startswith("scale")]
    detail = f"the update is {step.scale:.4g} times that of a {OBJECTIVES[asked].title}"
    found = Finding("constant-divisor", "fault", detail)
    return replace(step, objective="constant-divisor", alike=(), findings=(*kept, found))


def _settled(step: StepResult, common: str) -> StepResult:
    if step.objective is None or common == step.objective or common not in step.alike:
        return step
    alike = tuple(name for name in (step.objective, *step.alike) if name != common)
    findings = tuple(replace(f, id=common) if f.id == step.objective else f for f in step.findings)
    return replace(step, objective=common, alike=alike, findings=findings)


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


def not_told_apart(cases: Sequence[CaseResult], reasons: Sequence[str] = ()) -> tuple[str, ...]:
    """Sentences on the rules that give the same weights in every judged case."""
    judged = [c for c in cases if c.status == "judged" and c.steps]
    return (*_same_rules(judged, reasons), *_same_tokens(judged))


def _same_rules(judged: Sequence[CaseResult], reasons: Sequence[str]) -> list[str]:
    sets = [{s.objective, *s.alike} for c in judged for s in c.steps if s.objective]
    common = set.intersection(*sets) if sets else set()
    if len(common) < 2:
        return []
    names = [OBJECTIVES[name].title for name in OBJECTIVES if name in common]
    why = list(reasons)
    if max(c.case.ranks for c in judged) == 1:
        why.append("no case with two ranks was judged")
    if max(c.case.accumulation for c in judged) == 1:
        why.append("no case with more than one micro-batch was judged")
    if max(c.case.micro_batch for c in judged) == 1:
        why.append("no case had more than one row in a micro-batch")
    because = f": {'; '.join(why)}" if why else ""
    return [f"These give the same weights in every case and cannot be told apart: {', '.join(names)}{because}."]


def _same_tokens(judged: Sequence[CaseResult]) -> list[str]:
    return [
        f"In the case '{case.case.name}', {count} response tokens have gradients that depend on those of others; their "
        "weights are taken to be as asked."
        for case in judged
        if (count := max(step.undetermined for step in case.steps))
    ]


def public_reports(versions: Mapping[str, str], findings: Sequence[str]) -> tuple[PublicReport, ...]:
    """Known faults of the audited packages that show as one of the findings, from the file that ``doctor`` reads.

    Reports that name other versions than the audited ones are left out.

    Args:
        versions: of the audited packages, by name.
        findings: ids, keys of ``CATALOGUE``.
    """
    result = []
    for fault in load_known_faults():
        if fault.package in versions and set(fault.findings) & set(findings):
            installed = fault.hits(versions[fault.package])
            if fault.affected is not None and not installed:
                continue
            affected = fault.affected or "not known"
            result.append(PublicReport(fault.id, fault.package, affected, fault.remedy, fault.sources, installed))
    return tuple(result)


def _faults(cases: Sequence[CaseResult]) -> dict[str, list[tuple[CaseResult, Finding]]]:
    found: dict[str, list[tuple[CaseResult, Finding]]] = {}
    for case in cases:
        for finding in case.faults:
            found.setdefault(finding.id, []).append((case, finding))
    return found


def _tried(cases: Sequence[CaseResult]) -> list[CaseResult]:
    """The cases of settings that the stack has."""
    return [case for case in cases if case.status != "skipped"]


def _severity(case: CaseResult) -> float:
    return max((step.lost for step in case.steps), default=1.0)


def _what(main: str, worst: tuple[CaseResult, Finding], hit: Sequence, tried: Sequence, asked: str) -> str:
    where = "in every case" if len(hit) == len(tried) else f"in {len(hit)} of {len(tried)} cases"
    title = OBJECTIVES[asked].title
    if main in OBJECTIVES:
        name = CATALOGUE[main].title
        return f"This trainer takes the {name} where the {title} was asked for ({where}): {worst[1].detail}."
    if worst[0].policy is not None:
        return f"The policy objective is not the one asked for: {where} {CATALOGUE[main].says} ({worst[1].detail})."
    return f"The {title} was asked for, but {where} {CATALOGUE[main].says} ({worst[1].detail})."


def _means(main: str, case: CaseResult, others: Sequence[str], faults: Mapping) -> str:
    words = CATALOGUE[main].meaning
    step = _worst_step(case)
    if step is not None and main not in _TURNED:
        moved = "does not arrive" if main in _GRADIENT_LOST else "goes to other tokens than it should"
        words += (
            f" In the case '{case.case.name}' the smallest token weight is {abs(step.smallest):.2f} and the largest "
            f"{step.largest:.2f} of what they should be, and {step.lost:.0%} of the batch's gradient {moved}."
        )
    if others:
        names = ", ".join(f"{CATALOGUE[i].title} ({len(faults[i])})" for i in others)
        words += f" Also found (number of cases): {names}."
    return words


def _law(judged: Sequence[CaseResult]) -> str:
    """What the size of the update follows, where that is not one and the same weight in all."""
    law = {"tokens": "the number of trained tokens", "rows": "the mean length of a response"}
    name = scale_law(judged)
    return f" The size of the update follows {law[name]}." if name in law else ""


def _worst_step(case: CaseResult) -> StepResult | None:
    return max(case.steps, key=lambda s: s.lost, default=None)


def _clean(
    cases: Sequence[CaseResult], judged: Sequence[CaseResult], objective: str | None, asked: str
) -> AuditVerdict:
    titles = [OBJECTIVES[name].title for name in OBJECTIVES if any(c.case.asked == name for c in judged)]
    low = min((s.smallest for c in judged for s in c.steps), default=1.0)
    high = max((s.largest for c in judged for s in c.steps), default=1.0)
    skipped = len(cases) - len(judged)
    first = f"In all {len(judged)} judged cases the weights are those asked for: {', '.join(titles)}."
    second = f"Token weights lie between {low:.3f} and {high:.3f} of what they should be" + (
        f"; {skipped} settings were skipped, since the stack lacks them." if skipped else "."
    )
    return AuditVerdict("no finding", objective or asked, asked, (first, " ".join([second, *_notes(judged)])))


def _notes(judged: Sequence[CaseResult]) -> list[str]:
    """What changes which examples are trained how often, and is no fault of the weights, in a sentence each."""
    said = []
    for name in ("rows-repeated", "window-mixed", "window-dropped"):
        hit = [(case, f) for case in judged for f in case.all_findings if f.id == name and f.kind == "note"]
        if hit:
            case, finding = hit[0]
            said.append(f"But ({len(hit)} of {len(judged)} cases) in '{case.case.name}' {finding.detail}.")
    return said


def _no_verdict(
    cases: Sequence[CaseResult], judged: Sequence[CaseResult], objective: str | None, asked: str
) -> AuditVerdict:
    tried = _tried(cases)
    reasons = list(dict.fromkeys(c.reason for c in tried if c.reason) or dict.fromkeys(c.reason for c in cases))
    first = f"None of the {len(cases)} cases could be judged."
    second = f"The first reason: {reasons[0]}." if reasons else "No case ran."
    if judged:
        left = [case for case in tried if case.status != "judged"]
        first = (
            f"{len(left)} of {len(tried)} cases could not be judged, so nothing is acquitted; in the other "
            f"{len(judged)} the weights are those asked for."
        )
        second = f"The first reason, in '{left[0].case.name}': {left[0].reason}."
    return AuditVerdict("cannot judge", objective, asked, (first, second))

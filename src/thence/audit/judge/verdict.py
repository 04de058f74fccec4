"""All cases together: one verdict, in two plain sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thence.audit.judge.findings import CATALOGUE
from thence.audit.judge.settle import common_objective, scale_law
from thence.audit.objectives import OBJECTIVES
from thence.audit.result import AuditVerdict, CaseResult, Finding, PublicReport, StepResult
from thence.known_faults import load_known_faults

_BY_SEVERITY = (
    "not-finite", "against-gradient",
    "parameters-untouched", "no-step", "advantage-sign", "first-and-last-only", "first-only", "last-only",
    "all-but-first", "all-but-last", "rank-missing", "rows-dropped", "ranks-differ", "frozen-moved",
    "differs-by-parameter",
    "depends-on-cut", "labels-shifted", "contaminated", "micro-batch-mean", "rank-mean", "pass-mean", "sequence-mean",
    "micro-batch-sequence-mean", "constant-divisor", "tokens-dropped", "token-dependent", "double-counted", "unnamed",
    "token-mean", "leak", "prompt-trained", "padding-trained", "end-missing", "first-missing", "advantage", "smoothing",
    "window-mixed", "scale-by-parameter", "clipped-by-shard", "scale-by-shard", "incomplete-window-scaled",
    "scale-accumulation", "scale-ranks", "scale",
)  # fmt: skip
"""The order in which faults are named where there are several."""
_OF_THE_WHOLE = {"depends-on-cut", "scale", "scale-accumulation", "scale-ranks", "scale-by-parameter", "scale-by-shard"}
"""Faults that say nothing of single tokens: however many cases have them, they do not explain the others."""
_RARE = 3
"""A fault in so many times fewer cases than another one is what some of the cases happen to look like."""
_RULE_OF_SOME = _BY_SEVERITY.index("token-mean")
"""Where a rule stands that does not give the weights of every judged step: it is not what the trainer does."""


BEYOND: Mapping[str, str] = {"resume": "resume-", "saved": "saved-", "evaluation": "evaluation-"}
"""How the ids of faults beyond the weights of a step begin, by ``Case.beyond``."""

_GRADIENT_LOST = {
    "first-and-last-only",
    "first-only",
    "last-only",
    "all-but-first",
    "all-but-last",
    "rank-missing",
    "rows-dropped",
    "tokens-dropped",
    "end-missing",
    "first-missing",
}
_TURNED = {"clipped-by-shard", "scale-by-shard", "scale-by-parameter"}
"""Every token may have its weight; what differs is the size of the update from part to part."""


@dataclass(frozen=True)
class Hit:
    """A fault in a case.

    Args:
        step: of which the finding speaks: the one with most lost; None: of the case as a whole.
    """

    case: CaseResult
    finding: Finding
    step: StepResult | None

    @property
    def lost(self) -> float:
        """Share of the gradient that did not arrive."""
        shown = self.figures
        return 1.0 if shown is None else shown.lost

    @property
    def figures(self) -> StepResult | None:
        """The step whose figures stand beside the finding."""
        return self.step or max(self.case.steps, key=lambda step: step.lost, default=None)


Faults = Mapping[str, Sequence[Hit]]
"""By finding id, one hit a case."""


def judge_all(
    cases: Sequence[CaseResult], versions: Mapping[str, str], asked: str = "", target: str = ""
) -> AuditVerdict:
    """The verdict over a matrix.

    A fault in any case is a finding, also in a case whose weights could not be judged. A trainer is acquitted only if
    every case that the stack has was judged: an update that nobody can explain is no proof that it is right.

    Args:
        versions: of the audited stack, to look up public reports.
        asked: the objective asked for where cases differ; empty: that of the first judged case.
        target: the adapter's name, for the same; empty: no adapter, and no report is looked up.
    """
    judged = [c for c in cases if c.status == "judged" and not c.case.beyond]
    asked = asked or (judged[0].case.asked if judged else cases[0].case.asked if cases else "token-mean")
    faults = _faults(cases)
    objective = common_objective(judged, asked)
    if not faults and not _all_judged(cases):
        return _no_verdict(cases, judged, objective, asked)
    if not faults:
        return _clean(cases, judged, objective, asked)
    ids = sorted(faults, key=lambda name: _place(name, judged, faults))
    main = ids[0]
    worst = max(faults[main], key=lambda hit: hit.lost)
    return AuditVerdict(
        "finding",
        objective,
        asked,
        (_what(main, worst, faults[main], cases, asked), _means(main, worst, ids[1:], faults) + _law(judged)),
        " ".join(list(dict.fromkeys(CATALOGUE[i].remedy for i in ids))[:3]),
        public_reports(target, versions, faults),
        worst.case.case.name,
    )


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


def public_reports(target: str, versions: Mapping[str, str], faults: Faults) -> tuple[PublicReport, ...]:
    """Known faults of the audited code and version that show as what was found, from the file that ``doctor`` reads.

    A package that is merely installed beside the audited code is not blamed, nor are settings that no case had.

    Args:
        target: the adapter's name.
        versions: of the audited packages, by name.
    """
    result = []
    for known in load_known_faults():
        if target not in known.adapters or not known.hits(versions.get(known.package, "")):
            continue
        hits = [hit for name in known.findings for hit in faults.get(name, ())]
        if any(known.could_be(hit.case.case.options) for hit in hits):
            result.append(
                PublicReport(known.id, known.package, known.affected or "", known.remedy, known.sources, True)
            )
    return tuple(result)


def _faults(cases: Sequence[CaseResult]) -> dict[str, list[Hit]]:
    found: dict[str, list[Hit]] = {}
    for case in cases:
        own: dict[str, Hit] = {f.id: Hit(case, f, None) for f in reversed(case.findings) if f.kind == "fault"}
        for step in sorted(case.steps, key=lambda step: -step.lost):
            for finding in step.findings:
                if finding.kind == "fault":
                    own.setdefault(finding.id, Hit(case, finding, step))
        for name, hit in own.items():
            found.setdefault(name, []).append(hit)
    return found


def _place(name: str, judged: Sequence[CaseResult], faults: Faults) -> tuple[bool, bool, float]:
    """Where a fault stands among several, the first is named first: those of the steps, then those beyond them.

    Among those of the steps, what most cases show stands before what a few happen to look like.
    """
    most = max((len(hits) for other, hits in faults.items() if other not in _OF_THE_WHOLE), default=0)
    return is_beyond(name), len(faults[name]) * _RARE <= most, _rank(name, judged, faults)


def _rank(name: str, judged: Sequence[CaseResult], faults: Faults) -> float:
    """Where a fault stands among several, the first is named in the first sentence."""
    lost = [part for part in ("all-but-first", "all-but-last") if part in faults]
    if name == "no-step" and lost and all(hit.case.case.accumulation == 1 for hit in faults[name]):
        # A step with one micro-batch, which is the one that is lost.
        return _BY_SEVERITY.index(lost[0]) + 0.5
    if name in OBJECTIVES and not _fits_all(name, judged):
        return _RULE_OF_SOME
    return _BY_SEVERITY.index(name) if name in _BY_SEVERITY else len(_BY_SEVERITY)


def _fits_all(rule: str, judged: Sequence[CaseResult]) -> bool:
    """Whether a rule gives the weights of every judged step."""
    return all(rule in {step.objective, *step.alike} for case in judged for step in case.steps)


def _all_judged(cases: Sequence[CaseResult]) -> bool:
    tried = _tried(cases)
    return bool(tried) and all(case.status == "judged" for case in tried)


def _tried(cases: Sequence[CaseResult]) -> list[CaseResult]:
    """The cases of settings that the stack has."""
    return [case for case in cases if case.status != "skipped"]


def is_beyond(finding: str) -> bool:
    """Whether a fault is of resuming, saving or evaluating, and not of the weights of a step."""
    return finding.startswith(tuple(BEYOND.values()))


def _what(main: str, worst: Hit, hits: Sequence[Hit], cases: Sequence[CaseResult], asked: str) -> str:
    tried = _tried(cases)
    where = "in every case" if len(hits) == len(tried) else f"in {len(hits)} of {len(tried)} cases"
    title, name = OBJECTIVES[asked].title, CATALOGUE[main].title
    if is_beyond(main):
        return f"In the case '{worst.case.case.name}' {CATALOGUE[main].says} ({worst.finding.detail})."
    if main in OBJECTIVES and _fits_all(main, [case for case in cases if case.status == "judged"]):
        return f"This trainer takes the {name} where the {title} was asked for ({where}): {worst.finding.detail}."
    if worst.case.policy is not None:
        return (
            f"The policy objective is not the one asked for: {where} {CATALOGUE[main].says} ({worst.finding.detail})."
        )
    says = f"the weights are those of the {name}" if main in OBJECTIVES else CATALOGUE[main].says
    return f"The {title} was asked for, but {where} {says} ({worst.finding.detail})."


def _means(main: str, worst: Hit, others: Sequence[str], faults: Faults) -> str:
    words = CATALOGUE[main].meaning
    step = worst.figures
    if step is not None and main not in _TURNED and not is_beyond(main):
        moved = "does not arrive" if main in _GRADIENT_LOST else "goes to other tokens than it should"
        words += (
            f" In the case '{worst.case.case.name}' the smallest token weight is {step.smallest + 0.0:.2f} and the "
            f"largest {step.largest:.2f} of what they should be, and {step.lost:.0%} of the batch's gradient {moved}."
        ).replace("is -0.00", "is 0.00")
    if others:
        names = ", ".join(f"{CATALOGUE[i].title} ({len(faults[i])})" for i in others)
        words += f" Also found (number of cases): {names}."
    return words


def _law(judged: Sequence[CaseResult]) -> str:
    """What the size of the update follows, where that is not one and the same weight in all."""
    law = {"tokens": "the number of trained tokens", "rows": "the mean length of a response"}
    name = scale_law(judged)
    return f" The size of the update follows {law[name]}." if name in law else ""


def _clean(
    cases: Sequence[CaseResult], judged: Sequence[CaseResult], objective: str | None, asked: str
) -> AuditVerdict:
    titles = [OBJECTIVES[name].title for name in OBJECTIVES if any(c.case.asked == name for c in judged)]
    low = min((s.smallest for c in judged for s in c.steps), default=1.0)
    high = max((s.largest for c in judged for s in c.steps), default=1.0)
    skipped = len(cases) - len(_tried(cases))
    first = f"In all {len(judged)} judged cases the weights are those asked for: {', '.join(titles)}."
    second = f"Token weights lie between {low:.3f} and {high:.3f} of what they should be" + (
        f"; {skipped} settings were skipped, since the stack lacks them." if skipped else "."
    )
    if not judged:
        first = f"In all {len(_tried(cases))} judged cases of resuming, saving and evaluating nothing is wrong."
        second = "No token weights were judged."
    return AuditVerdict("no finding", objective or asked, asked, (first, " ".join([second, *_notes(cases)])))


def _notes(cases: Sequence[CaseResult]) -> list[str]:
    """What is worth knowing and no fault (which examples are trained how often ...), in a sentence each."""
    said, judged = [], [case for case in cases if case.status == "judged"]
    for name in ("rows-repeated", "window-mixed", "window-dropped", "evaluation-mean"):
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

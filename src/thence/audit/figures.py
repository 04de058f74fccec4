"""Figures that the terminal, the page and JUnit share: groups of rows, lost shares, and how numbers are said."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thence.audit.judge.findings import CATALOGUE
from thence.audit.judge.verdict import BEYOND, is_beyond
from thence.audit.objectives import OBJECTIVES
from thence.audit.result import (
    RESPONSE_ROLES,
    Case,
    CaseResult,
    Finding,
    Role,
    SequenceWeights,
    StepResult,
    TokenWeight,
)

if TYPE_CHECKING:
    from thence.audit.report import Report

ROLES: Mapping[Role, str] = {
    "prompt": "what the user wrote; not to be trained",
    "first": "the first token of the response",
    "body": "the rest of the response",
    "end": "the token that ends the response",
    "after": "what the chat template writes behind the end",
    "padding": "filling up to the longest row; not to be trained",
}
"""In the order of a row."""


@dataclass(frozen=True)
class MicroBatchRatio:
    """Rows that went through the model together.

    Args:
        rank: its rank, or None where not known.
        index: its place among those of its rank, or None where not known; then each row stands alone.
        ratio: weight of its response tokens over the weight asked for, tokens averaged by the latter.
        examples: of its rows, from 1.
    """

    rank: int | None
    index: int | None
    ratio: float
    examples: tuple[int, ...]


@dataclass(frozen=True)
class Extreme:
    """A figure and the case in which it was found."""

    value: float
    case: str


def micro_batch_ratios(step: StepResult) -> list[MicroBatchRatio]:
    """The micro-batches of a step, by rank, in order. Rows whose micro-batch is not known stand alone."""
    groups: dict[tuple[int, int, int], list[SequenceWeights]] = {}
    for place, row in enumerate(step.sequences):
        alone = place if row.micro_batch is None else -1
        rank = -1 if row.rank is None else row.rank
        groups.setdefault((rank, -1 if row.micro_batch is None else row.micro_batch, alone), []).append(row)
    return [
        MicroBatchRatio(
            rows[0].rank,
            rows[0].micro_batch,
            mean_ratio(token for row in rows for token in row.tokens),
            tuple(row.example + 1 for row in rows),
        )
        for _, rows in sorted(groups.items(), key=lambda item: item[0])
    ]


def mean_ratio(tokens: Iterable[TokenWeight]) -> float:
    """Mean ratio of response tokens, averaged by the weight asked for; not a number if there are none."""
    response = [t for t in tokens if t.role in RESPONSE_ROLES and t.ideal]
    total = sum(abs(t.ideal) for t in response)
    return sum(abs(t.ideal) * t.ratio for t in response) / total if total else math.nan


def zero_bound(step: StepResult) -> float:
    """Ratios up to this one are taken for zero: what the error of a weight allows, at least 2% and at most 20%."""
    return min(0.2, max(0.02, 2 * step.error)) if math.isfinite(step.error) else 0.2


def lost_by_role(step: StepResult) -> dict[Role, float]:
    """Share of each response role's gradient weight that did not arrive, the scale of the whole update set aside."""
    scale = step.scale if step.scale is not None and abs(step.scale) > 1e-6 else 1.0
    total: dict[Role, float] = {}
    missing: dict[Role, float] = {}
    for token in (t for row in step.sequences for t in row.tokens if t.role in RESPONSE_ROLES):
        total[token.role] = total.get(token.role, 0.0) + abs(token.ideal)
        short = abs(token.ideal) * max(0.0, 1 - token.ratio / scale)
        missing[token.role] = missing.get(token.role, 0.0) + short
    return {role: missing[role] / total[role] for role in RESPONSE_ROLES if total.get(role)}


def faults(result: CaseResult) -> tuple[Finding, ...]:
    """The findings of a case that are not what was asked for."""
    return result.faults


def judged(report: Report) -> list[CaseResult]:
    """The cases that were judged."""
    return [result for result in report.cases if result.status == "judged"]


def faulty(report: Report) -> list[CaseResult]:
    """The cases with a fault, those included that could not be judged further."""
    return [result for result in report.cases if faults(result)]


def tried(report: Report) -> list[CaseResult]:
    """The cases of settings that the stack has."""
    return [result for result in report.cases if result.status != "skipped"]


def extremes(report: Report) -> dict[str, Extreme]:
    """``smallest`` and ``largest`` ratio and ``lost`` share: of one step if there is a fault, else over all cases."""
    faulted = step_of_the_verdict(report)
    steps = [faulted] if faulted else [(result.case.name, step) for result in judged(report) for step in result.steps]
    if not steps:
        return {}
    least, most = min(steps, key=lambda s: s[1].smallest), max(steps, key=lambda s: s[1].largest)
    lost = max(steps, key=lambda s: s[1].lost)
    return {
        "smallest": Extreme(least[1].smallest, least[0]),
        "largest": Extreme(most[1].largest, most[0]),
        "lost": Extreme(lost[1].lost, lost[0]),
    }


def step_of_the_verdict(report: Report) -> tuple[str, StepResult] | None:
    """The faulty step, with its case, of which all figures speak: that of the verdict's case with most lost."""
    cases = [result for result in faulty(report) if result.case.name == report.verdict.case] or faulty(report)
    steps = [(result.case.name, step) for result in cases for step in result.steps]
    return max(steps, key=lambda pair: pair[1].lost, default=None)


def step_with_most_lost(report: Report) -> StepResult | None:
    """The step of which the figure ``lost`` of :func:`extremes` speaks."""
    faulted = step_of_the_verdict(report)
    steps = [faulted[1]] if faulted else [step for result in judged(report) for step in result.steps]
    return max(steps, key=lambda step: step.lost, default=None)


def steps_alike(a: StepResult, b: StepResult) -> bool:
    """Whether two steps are to be told in one line."""
    near = max(zero_bound(a), zero_bound(b)) / 2
    return (
        a.objective == b.objective
        and {f.id for f in a.findings} == {f.id for f in b.findings}
        and all(abs(x - y) <= near for x, y in ((a.smallest, b.smallest), (a.largest, b.largest)))
        and abs((a.scale or 0.0) - (b.scale or 0.0)) <= near
    )


def ratio_text(value: float | None) -> str:
    """A ratio as people read it: two decimals, three digits if it is large."""
    if value is None or math.isnan(value):
        return "–"
    if abs(value) >= 99.995:
        return f"{value:.3g}"
    return f"{value + 0.0:.2f}".replace("-0.00", "0.00")


def title(finding: Finding | str) -> str:
    """What a finding is called."""
    key = finding if isinstance(finding, str) else finding.id
    return CATALOGUE[key].title if key in CATALOGUE else key


def objective_title(key: str | None) -> str:
    """What an objective is called; for none, that no rule was recognised."""
    if key is None:
        return "no rule with a name"
    return OBJECTIVES[key].title if key in OBJECTIVES else key


def amounts_to(report: Report) -> str:
    """What the weights of all judged cases amount to: their rule; where that was asked for, the commonest fault."""
    rule, asked = report.verdict.objective, report.verdict.asked
    cases: dict[str, int] = {}
    for fault in (f for result in report.cases for f in faults(result) if not is_beyond(f.id)):
        cases[fault.id] = cases.get(fault.id, 0) + 1
    cases.pop(rule or "", None)
    often = sorted(cases, key=lambda key: -cases[key])
    if rule is not None and rule != asked:
        return objective_title(rule)
    return title(often[0]) if often else objective_title(rule)


def subject(target: str) -> str:
    """Who is audited, to begin a sentence with."""
    return {"command": "The audited program", "check": "The audited training step"}.get(target, target)


def headline(report: Report) -> str:
    """The outcome in one sentence without a term of the trade."""
    who = subject(report.target)
    bad = {finding.id for result in report.cases for finding in faults(result)}
    if bad and all(is_beyond(finding) for finding in bad):
        verbs = {"resume": "resume", "saved": "save", "evaluation": "evaluate"}
        wrong = [verbs[kind] for kind, start in BEYOND.items() if any(finding.startswith(start) for finding in bad)]
        return f"{who} does not {' and '.join(wrong)} as it should."
    return {
        "no finding": f"{who} trains what it was asked to train.",
        "finding": f"{who} does not train what it was asked to train.",
        "cannot judge": f"{who} could not be judged{' in full' if judged(report) else ''}.",
    }[report.verdict.outcome]


def case_settings(case: Case) -> str:
    """The settings of a case, as far as they are not those of every case."""
    parts = [f"{_count(case.micro_batch, 'row')} × {_count(case.accumulation, 'micro-batch', 'micro-batches')}"]
    parts[0] += f" × {case.ranks} ranks" if case.ranks > 1 else ""
    parts += [f"{case.examples} examples"]
    parts += [f"{case.epochs} epochs"] if case.epochs > 1 else []
    parts += [case.optimizer.replace("adamw", "AdamW").replace("sgd", "SGD")]
    parts += [f"clipping at {case.clip:g}"] if case.clip else []
    parts += [case.precision] if case.precision != "float32" else []
    parts += ["packing"] if case.packing else []
    parts += ["checkpointing"] if case.checkpointing else []
    parts += [f"label smoothing {case.label_smoothing:g}"] if case.label_smoothing else []
    parts += [f"{key} = {value}" for key, value in case.options.items()]
    return ", ".join(parts)


def place(rank: int | None, micro_batch: int | None, ranks: int) -> str:
    """Where a row stood in its step, from 1."""
    where = "micro-batch not known" if micro_batch is None else f"micro-batch {micro_batch + 1}"
    return f"rank {rank + 1}, {where}" if ranks > 1 and rank is not None else where


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"

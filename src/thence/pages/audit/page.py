"""The page of an audit: verdict, what to change, heat map, every figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thence.audit.figures import (
    ROLES,
    amounts_to,
    case_settings,
    extremes,
    faults,
    faulty,
    headline,
    judged,
    lost_by_role,
    objective_title,
    place,
    ratio_text,
    title,
    tried,
)
from thence.audit.judge.findings import CATALOGUE
from thence.audit.objectives import OBJECTIVES
from thence.audit.report import Report
from thence.audit.result import RESPONSE_ROLES, CaseResult, PublicReport, Role, StepResult
from thence.files import finite, write_atomically
from thence.pages.audit.heatmap import SHADES, heat_map, shade
from thence.pages.audit.policy import policy_table
from thence.pages.table import NOTHING, Cell, Table, TableRow
from thence.pages.template import render
from thence.wording import percent

_LEGEND = (
    (1 / 8, "⅛ or less"),
    (1 / 4, "¼"),
    (1 / 2, "½"),
    (1.0, "as asked"),
    (2.0, "2×"),
    (4.0, "4×"),
    (8.0, "8× or more"),
)
_STATUSES = (
    ("failed", "Failed", "The stack stopped with an error or ran out of time."),
    ("not judged", "Not judged", "It ran, but its update is not a weighted sum of the gradients of tokens."),
    ("skipped", "Skipped", "The stack does not have the setting."),
)


def write_page(report: Report, path: Path) -> None:
    """Write the page; a reader never sees half of it."""
    write_atomically(path, render_page(report))


def render_page(report: Report) -> str:
    """The page as text. Everything that the audited stack said is escaped; nothing is loaded from anywhere."""
    view = heat_map(report)
    verdict = report.verdict
    found = {verdict.objective} | {step.objective for result in judged(report) for step in result.steps}
    return render(
        "audit",
        data=finite(view.data),
        target=report.target,
        outcome=verdict.outcome,
        title=headline(report),
        sentences=[sentence for sentence in verdict.sentences if sentence],
        tiles=_tiles(report),
        remedy=verdict.remedy,
        known=[_known(fault) for fault in verdict.known],
        findings=_findings(report),
        view=view,
        shades=[(n, round(8 + 92 * n / SHADES)) for n in range(1, SHADES + 1)],
        legend=[(shade(ratio, 1.0, 0.0, 0.0), words) for ratio, words in _LEGEND],
        steps=[_step(result, step) for result, step in _steps(report)],
        stepless=[_stepless(result) for result in judged(report) if not result.steps],
        roles=_roles(report),
        meanings=_meanings(report),
        examples=_examples(report),
        policies=policy_table(report),
        others=[(head, said, _others(report, status)) for status, head, said in _STATUSES if _others(report, status)],
        objectives=[(o.title, o.formula, key == verdict.asked, key in found) for key, o in OBJECTIVES.items()],
        not_told_apart=report.not_told_apart,
        verified=report.verified,
        not_verified=report.not_verified,
        command=report.command,
        facts=_facts(report),
    )


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """The answer in figures: label, figure, where."""
    checked = judged(report)
    tiles = [("The settings ask for", objective_title(report.verdict.asked), "")]
    if not checked:
        return tiles
    tiles.append(("The weights amount to", amounts_to(report), ""))
    most = extremes(report)
    if most:
        tiles.append(
            ("Smallest token weight", f"{ratio_text(most['smallest'].value)} × ideal", _in(most["smallest"].case))
        )
        tiles.append(
            ("Largest token weight", f"{ratio_text(most['largest'].value)} × ideal", _in(most["largest"].case))
        )
        where = _in(most["lost"].case) if most["lost"].value >= 0.0005 else "in any case"
        tiles.append(("Gradient lost", percent(most["lost"].value), where))
    tiles.append(("Cases with a fault", f"{len(faulty(report))} of {len(tried(report))}", ""))
    return tiles


def _in(case: str) -> str:
    return f"in “{case}”"


def _known(fault: PublicReport) -> dict[str, Any]:
    return {
        "title": title(fault.id),
        "package": fault.package,
        "affected": fault.affected,
        "installed": fault.installed,
        "remedy": fault.remedy,
        "sources": [(source, source.startswith(("https://", "http://"))) for source in fault.sources],
    }


def _findings(report: Report) -> list[dict[str, Any]]:
    """Every finding once, faults first, with the cases in which it stands."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for result in report.cases:
        for finding in result.all_findings:
            entry = CATALOGUE.get(finding.id)
            known = found.setdefault(
                (finding.kind, finding.id),
                {
                    "kind": finding.kind,
                    "title": title(finding),
                    "meaning": entry.meaning if entry else "",
                    "remedy": entry.remedy if entry else "",
                    "cases": [],
                },
            )
            known["cases"].append((result.case.name, finding.detail))
    order = ("fault", "choice", "note")
    return sorted(found.values(), key=lambda f: (order.index(f["kind"]), -len(f["cases"])))


def _step(result: CaseResult, step: StepResult) -> dict[str, Any]:
    findings = (*result.findings, *step.findings)
    return {
        "case": _name(result, step),
        "settings": case_settings(result.case),
        "bad": any(f.kind == "fault" for f in findings),
        "objective": objective_title(step.objective),
        "alike": ", ".join(objective_title(key) for key in step.alike),
        "smallest": ratio_text(step.smallest),
        "largest": ratio_text(step.largest),
        "scale": "not known" if step.scale is None else ratio_text(step.scale),
        "lost": percent(step.lost),
        "residual": f"{step.residual:.1e}",
        "condition": f"{step.condition:.3g}",
        "error": f"{step.error:.1e}",
        "findings": [(f.kind, title(f), f.detail) for f in findings],
        "seconds": f"{result.seconds:.1f}",
    }


def _stepless(result: CaseResult) -> dict[str, Any]:
    return {
        "case": result.case.name,
        "settings": case_settings(result.case),
        "bad": bool(faults(result)),
        "good": bool(result.case.beyond) and not faults(result),
        "said": result.said or "no step",
        "findings": [(f.kind, title(f), f.detail) for f in result.all_findings],
    }


def _meanings(report: Report) -> list[tuple[Role, str]]:
    """The roles that occur, and what they mean."""
    steps = [step for result in judged(report) for step in result.steps]
    return [(role, meaning) for role, meaning in ROLES.items() if any(role in step.roles for step in steps)]


def _roles(report: Report) -> Table:
    """The mean ratio by role, and what was lost of each."""
    present: list[Role] = [role for role, _ in _meanings(report)]
    rows = []
    for result, step in _steps(report):
        lost = lost_by_role(step)
        cells = []
        for role in present:
            sub = f"{percent(lost[role])} lost" if lost.get(role, 0.0) >= 0.0005 else ""
            cells.append(Cell(ratio_text(step.roles[role]), sub) if role in step.roles else NOTHING)
        rows.append(TableRow(_name(result, step), tuple(cells)))
    return Table("", ("Case", *present), tuple(rows))


def _examples(report: Report) -> Table:
    """The heat map in words and figures: a row an example of a step."""
    rows = []
    for result, step in _steps(report):
        for row in step.sequences:
            tokens = sum(t.role in RESPONSE_ROLES for t in row.tokens)
            where = place(row.rank, row.micro_batch, result.case.ranks)
            cells = (Cell(str(tokens)), Cell(where), Cell(ratio_text(row.weight)))
            rows.append(TableRow(f"example {row.example + 1}", cells, _name(result, step)))
    headers = ("Case, example", "Tokens of the response", "Where", "Weight over ideal")
    return Table("", headers, tuple(rows), words=(1,))


def _steps(report: Report) -> list[tuple[CaseResult, StepResult]]:
    return [(result, step) for result in judged(report) for step in result.steps]


def _name(result: CaseResult, step: StepResult) -> str:
    return result.case.name + (f", step {step.index}" if len(result.steps) > 1 else "")


def _others(report: Report, status: str) -> list[tuple[str, str, str]]:
    return [
        (r.case.name, case_settings(r.case), r.reason or "no reason given") for r in report.cases if r.status == status
    ]


def _facts(report: Report) -> list[tuple[str, str]]:
    probe = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in report.probe.items())
    facts = [(str(name), str(version)) for name, version in report.versions.items()]
    facts += [("probe", probe), ("thence", report.thence), ("date", report.date), ("took", f"{report.seconds:.0f} s")]
    return [(name, value) for name, value in facts if value]

"""An audit as JUnit XML, so that any CI shows its cases as tests."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from thence.audit.figures import faults, objective_title, place, ratio_text, title
from thence.audit.report import Report
from thence.audit.result import CaseResult, StepResult
from thence.foreign_text import visible

_NOT_XML = re.compile("[\ufffe\uffff]")


def junit_xml(report: Report) -> str:
    """One test a case: passed, failed (a fault, with the weights of the rows), skipped, or an error (not judged)."""
    failed = sum(bool(faults(r)) for r in report.cases)
    counts = {
        "tests": str(len(report.cases)),
        "failures": str(failed),
        "errors": str(sum(r.status in ("failed", "not judged") and not faults(r) for r in report.cases)),
        "skipped": str(sum(r.status == "skipped" for r in report.cases)),
        "time": f"{report.seconds:.3f}",
    }
    name = f"thence audit {_clean(report.target)}"
    suites = ElementTree.Element("testsuites", {"name": name, **counts})
    suite = ElementTree.SubElement(suites, "testsuite", {"name": name, "timestamp": _clean(report.date), **counts})
    properties = ElementTree.SubElement(suite, "properties")
    facts = {**{f"version.{k}": v for k, v in report.versions.items()}, "command": report.command}
    facts |= {"verdict": " ".join(report.verdict.sentences), "outcome": report.verdict.outcome}
    facts |= {f"verified.{i}": said for i, said in enumerate(report.verified, 1)}
    facts |= {f"not_verified.{i}": said for i, said in enumerate(report.not_verified, 1)}
    for key, value in facts.items():
        ElementTree.SubElement(properties, "property", {"name": _clean(key), "value": _clean(value)})
    for result in report.cases:
        suite.append(_test(result, report.target))
    ElementTree.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"


def _test(result: CaseResult, target: str) -> ElementTree.Element:
    attributes = {
        "classname": f"thence.audit.{_clean(target)}",
        "name": _clean(result.case.name),
        "time": f"{result.seconds:.3f}",
    }
    test = ElementTree.Element("testcase", attributes)
    if result.status == "skipped":
        ElementTree.SubElement(test, "skipped", {"message": _clean(result.reason)})
        return test
    bad = faults(result)
    if result.status != "judged" and not bad:
        said = {"message": _clean(f"{result.status}: {result.reason}"), "type": result.status}
        ElementTree.SubElement(test, "error", said).text = _clean(result.reason)
        return test
    if bad:
        message = "; ".join(f"{title(f)}: {f.detail}" if f.detail else title(f) for f in bad)
        step = next((s for s in result.steps if any(f.kind == "fault" for f in s.findings)), None)
        if step is not None:
            rows = " ".join(ratio_text(row.weight) for row in step.sequences)
            message += f"; weights of the rows over those asked for in step {step.index}: {rows}"
        if result.status != "judged":
            message += f"; {result.status}: {result.reason}"
        said = {"message": _clean(message), "type": _clean(", ".join(f.id for f in bad))}
        ElementTree.SubElement(test, "failure", said).text = _clean(weights_text(result))
    other = [f for f in result.all_findings if f.kind != "fault"]
    if other:
        ElementTree.SubElement(test, "system-out").text = _clean(
            "\n".join(f"{f.kind}: {title(f)}: {f.detail}" for f in other)
        )
    return test


def weights_text(result: CaseResult) -> str:
    """The weights of the rows of every step of a case, over the weights asked for."""
    lines = []
    for step in result.steps:
        lines.append(_summary(step))
        for row in step.sequences:
            where = place(row.rank, row.micro_batch, result.case.ranks)
            lines.append(f"  example {row.example + 1} ({where}): {ratio_text(row.weight)}")
    return "\n".join(lines)


def _summary(step: StepResult) -> str:
    scale = "not known" if step.scale is None else ratio_text(step.scale)
    return (
        f"step {step.index}: {objective_title(step.objective)}, scale {scale}, {step.lost:.1%} of the gradient lost; "
        "weight over the weight asked for, row by row:"
    )


def _clean(text: str) -> str:
    """Text without characters that XML cannot hold."""
    return _NOT_XML.sub("\ufffd", visible(str(text)))

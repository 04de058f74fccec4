"""An audit in the terminal: a line a case with a bar a micro-batch, then the verdict in plain sentences."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterable
from io import StringIO
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from thence.audit.figures import (
    amounts_to,
    extremes,
    faults,
    faulty,
    headline,
    judged,
    lost_by_role,
    micro_batch_ratios,
    objective_title,
    ratio_text,
    step_with_most_lost,
    steps_alike,
    title,
    tried,
    zero_bound,
)
from thence.audit.result import CaseResult, StepResult
from thence.foreign_text import visible
from thence.terminal import make_console
from thence.wording import percent

if TYPE_CHECKING:
    from thence.audit.report import Report

_BARS = (("▁", 0.3), ("▂", 0.6), ("▃", 1.0), ("▅", 1.5), ("▆", 2.5), ("▇", 5.0), ("█", math.inf))
_IDEAL, _ZERO = "▄", "·"
_SIGNS = {"skipped": ("–", "dim"), "failed": ("!", "red"), "not judged": ("?", "yellow")}
_NAME, _BAR, _RANGE, _SCALE = 34, 13, 13, 7
_FIGURES = _BAR + _RANGE + _SCALE + 8
"""Characters between the name of a case and what is said of it."""
_SAID = 24
"""Characters that are kept for it; on a terminal with less the name stands above the figures."""
_INDENT = 4
_OUTCOMES = {"no finding": "bold green", "finding": "bold red", "cannot judge": "bold yellow"}
_REASON = 160


def report_text(report: Report, *, colour: bool | None = None, width: int | None = None) -> str:
    """The whole audit as text.

    Args:
        colour: with terminal escapes or without; None: with, if standard output is a terminal.
        width: of a line, characters; None: that of the terminal, or 100.
    """
    if colour is None:
        colour = sys.stdout.isatty()
    out = StringIO()
    console = make_console(
        file=out,
        width=width or shutil.get_terminal_size((100, 24)).columns,
        force_terminal=colour,
        color_system="standard" if colour else None,
        no_color=not colour,
        legacy_windows=False,
    )
    versions = ", ".join(f"{_line(name)} {_line(version)}" for name, version in report.versions.items())
    console.print(Text.assemble(("thence audit ", "bold"), (_line(report.target), "bold"), f"  {versions}"))
    console.print()
    names = name_width(result.case.name for result in report.cases)
    low = console.width < 2 + names + _FIGURES + _SAID
    for line in (table_head(names), *(case_line(result, names=names) for result in report.cases)):
        if low:
            console.print(_below_each_other(line, names, console))
        else:
            console.print(line, soft_wrap=True)
    console.print()
    console.print(legend())
    console.print()
    _print_verdict(console, report)
    return out.getvalue()


def verdict_text(report: Report) -> Text:
    """Outcome, the two sentences, and the figures they rest on."""
    text = Text()
    text.append(f"{_line(headline(report))}\n", _OUTCOMES[report.verdict.outcome])
    text.append(" ".join(_line(sentence) for sentence in report.verdict.sentences if sentence))
    for label, said in _facts(report):
        text.append(f"\n{label}: ", "bold")
        text.append(said)
    return text


def case_line(result: CaseResult, *, names: int = _NAME) -> Text:
    """A case in one line; further lines for later steps that differ from the first.

    Args:
        names: width of the column of names, characters.
    """
    name = _line(result.case.name)
    bad = faults(result)
    if result.status != "judged" and bad:
        line = Text.assemble(("✗ ", "bold red"), f"{name:<{names}}  ", (", ".join(title(f) for f in bad), "red"))
        return line.append(f"; {result.status}: {_short(result.reason)}", "yellow")
    if result.status != "judged":
        sign, style = _SIGNS[result.status]
        reason = _short(result.reason) or "no reason given"
        return Text.assemble((f"{sign} ", style), (f"{name:<{names}}  ", style), (f"{result.status}: {reason}", style))
    noted = any(f.kind == "note" for f in result.all_findings)
    sign, style = ("✗ ", "bold red") if bad else ("~ ", "yellow") if noted else ("✓ ", "green")
    line = Text.assemble((sign, style), f"{name:<{names}}  ")
    if not result.steps:
        said = ", ".join(title(f) for f in bad) or _line(result.said) or "no step"
        line.append(said, "red" if bad else "")
        notes = ", ".join(title(f) for f in result.all_findings if f.kind == "note")
        return line.append(f"; note: {notes}" if notes else "", "yellow")
    apart = [step for step in result.steps[1:] if not steps_alike(result.steps[0], step)]
    many = len(result.steps) > 1
    note = "" if not many else (f" ({len(result.steps)} steps alike)" if not apart else " (step 1)")
    line.append_text(_step(result, result.steps[0], note, whole=True))
    for step in apart:
        line.append(f"\n{'':{max(names - 6, 0)}}{f'step {step.index}':>8}  ")
        line.append_text(_step(result, step, ""))
    return line


def _below_each_other(lines: Text, names: int, console: Console) -> Text:
    """Lines of :func:`case_line` for a narrow terminal: the name, below it the rest, which wraps in its own column."""
    parts: list[Text] = []
    for line in lines.split("\n"):
        cut = 2 + max(names, line.plain.find("  ", 2) - 2)
        name, rest = line[:cut], line[cut + 2 :]
        name.rstrip()
        if name.plain.startswith("   "):  # a later step
            name = Text(f"  {name.plain.strip()}")
        figures = _FIGURES - 2 if rest.plain[_BAR : _BAR + 2] == "  " else 0
        said = rest[figures:].wrap(console, max(1, console.width - _INDENT - figures))
        parts += [name] if name else []
        for number, piece in enumerate(said or [Text()]):
            piece.rstrip()
            before = rest[:figures] if not number else Text(" " * figures)
            parts.append(Text(" " * _INDENT) + before + piece)
    return Text("\n").join(parts)


def table_head(names: int = _NAME) -> Text:
    """The heads of the columns of :func:`case_line`."""
    return Text(
        f"  {'case':<{names}}  {'micro-batches':<{_BAR}}  {'token weight':<{_RANGE}}  {'scale':<{_SCALE}}"
        "  what the weights amount to",
        "dim",
    )


def legend() -> Text:
    """What the signs mean."""
    return Text(
        f"A bar a micro-batch: {_IDEAL} the weight asked for, {_BARS[0][0]} less, {_BARS[-1][0]} more, {_ZERO} nothing "
        "arrived; a space parts the ranks. Token weight: smallest to largest in a response, over the weight asked for. "
        "Scale: sum of all weights over the sum asked for.",
        "dim",
    )


def name_width(names: Iterable[str]) -> int:
    """Width of a column for these names of cases, characters."""
    return min(44, max((len(_line(name)) for name in names), default=_NAME))


def _print_verdict(console: Console, report: Report) -> None:
    verdict = report.verdict
    console.print(verdict_text(report))
    if verdict.remedy:
        _section(console, "What to change", [_line(verdict.remedy)])
    if verdict.known:
        console.print("\nKnown reports of this fault", style="bold")
        for known in verdict.known:
            here = "; the audited version is among them" if known.installed else ""
            head = f"{_line(known.package)} {_line(known.affected)}{here}. {_line(known.remedy)}"
            console.print(Padding(Text(head), (0, 0, 0, 2), expand=False))
            for source in known.sources:
                console.print(Text(f"    {_line(source)}"), soft_wrap=True)
    _print_scope(console, report)
    if report.not_told_apart:
        _section(console, "What this audit could not tell apart", [_line(said) for said in report.not_told_apart])
    console.print("\nRepeat it with", style="bold")
    console.print(Text(f"  {_line(report.command)}"), soft_wrap=True)


def _print_scope(console: Console, report: Report) -> None:
    """Every note with its first case, then what was verified and what was not."""
    notes: dict[str, list[tuple[str, str]]] = {}
    for result in report.cases:
        for finding in result.all_findings:
            if finding.kind == "note":
                notes.setdefault(finding.id, []).append((result.case.name, finding.detail))
    if notes:
        said = [f"{title(key)} ({len(hit)} cases): in '{hit[0][0]}' {hit[0][1]}" for key, hit in notes.items()]
        _section(console, "Notes", [_line(each) for each in said])
    if report.verified:
        _section(console, "Verified", [_line(said) for said in report.verified])
    if report.not_verified:
        _section(console, "Not verified", [_line(said) for said in report.not_verified])


def _section(console: Console, head: str, paragraphs: Iterable[str]) -> None:
    console.print(f"\n{head}", style="bold")
    for paragraph in paragraphs:
        console.print(Padding(Text(paragraph), (0, 0, 0, 2), expand=False))


def _facts(report: Report) -> list[tuple[str, str]]:
    facts = [("Asked for", objective_title(report.verdict.asked))]
    if judged(report):
        facts.append(("The weights amount to", amounts_to(report)))
    most = extremes(report)
    if most:
        low, high, lost = most["smallest"], most["largest"], most["lost"]
        where = _line(low.case) if low.case == high.case else f"{_line(low.case)}; {_line(high.case)}"
        facts.append(
            ("Token weight over ideal", f"{ratio_text(low.value)} to {ratio_text(high.value)}" + _where(report, where))
        )
        step = step_with_most_lost(report)
        if step is not None and lost.value >= 0.0005:
            roles = ", ".join(f"{role} {percent(share)}" for role, share in lost_by_role(step).items())
            facts.append(
                ("Gradient lost", f"{percent(lost.value)} (by token role: {roles}){_where(report, lost.case)}")
            )
        else:
            facts.append(("Gradient lost", "none"))
    cases = faulty(report)
    names = ": " + "; ".join(_line(result.case.name) for result in cases) if cases else ""
    facts.append(("Cases with a fault", f"{len(cases)} of {len(tried(report))}{names}"))
    return facts


def _where(report: Report, case: str) -> str:
    return f" in {_line(case)}" if len(report.cases) > 1 else ""


def _step(result: CaseResult, step: StepResult, note: str, *, whole: bool = False) -> Text:
    """Bars, range, scale and name of a step; ``whole``: with the findings of the case and of all steps alike."""
    text = _bars(step)
    text.pad_right(max(0, _BAR - len(text)))
    text.append(f"  {f'{ratio_text(step.smallest)} to {ratio_text(step.largest)}':<{_RANGE}}")
    text.append(f"  {ratio_text(step.scale):<{_SCALE}}  ")
    findings = [*result.findings, *step.findings] if whole else list(step.findings)
    said = list(dict.fromkeys(title(f) for f in findings if f.kind == "fault"))
    objective = objective_title(step.objective)
    if not said or (step.objective != result.case.asked and objective not in said):
        said.insert(0, objective)
    text.append(", ".join(said) + note, "red" if any(f.kind == "fault" for f in findings) else "")
    noted = list(dict.fromkeys(title(f) for f in findings if f.kind == "note"))
    text.append(f"; note: {', '.join(noted)}" if noted else "", "yellow")
    return text


def _bars(step: StepResult) -> Text:
    text = Text()
    rank = None
    for number, group in enumerate(micro_batch_ratios(step)):
        if number and group.rank != rank:
            text.append(" ")
        rank = group.rank
        text.append(*_bar(group.ratio, step))
    return text


def _bar(ratio: float, step: StepResult) -> tuple[str, str]:
    """A sign and its style for a weight relative to the one asked for."""
    if math.isnan(ratio):
        return "?", "yellow"
    if abs(ratio) <= zero_bound(step):
        return _ZERO, "bold white on red"
    if ratio < 0:
        return "-", "bold white on magenta"
    if abs(ratio - 1) <= zero_bound(step):
        return _IDEAL, "green"
    sign = next(bar for bar, limit in _BARS if ratio <= limit)
    return sign, "blue" if ratio < 1 else "red"


def _line(text: str) -> str:
    """What a stack says, in one line and without anything that a terminal would obey."""
    return " ".join(visible(str(text)).split())


def _short(text: str) -> str:
    line = _line(text)
    return line if len(line) <= _REASON else f"{line[: _REASON - 1]}…"

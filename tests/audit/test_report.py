"""The terminal and JUnit of an audit, on reports made by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from tests.audit.made_reports import (
    CASES,
    Page,
    a_report,
    a_step,
    averaging,
    clean,
    dropping,
    first_and_last_only,
    judged,
    token_mean,
)
from thence.audit.figures import lost_by_role, micro_batch_ratios, steps_alike
from thence.audit.junit import junit_xml
from thence.audit.objectives import OBJECTIVES
from thence.audit.result import (
    Case,
    CaseResult,
    Finding,
)
from thence.audit.text import case_line, report_text


def line_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line[2:].startswith(name))


def test_a_dropped_micro_batch_shows_without_colour():
    text = report_text(dropping(), colour=False, width=120)
    assert "\x1b" not in text
    assert "▄··▄ " in line_of(text, "micro 2 x 4")
    assert "▄······▄" in line_of(text, "micro 1 x 8")
    assert line_of(text, "micro 8 x 1").startswith("✓ ")
    bad = line_of(text, "micro 2 x 4")
    assert bad.startswith("✗ ")
    assert "0.00 to 1.00" in bad
    assert "first and last micro-batch only" in bad


def test_ranks_are_parted_and_means_of_means_rise_and_fall():
    text = report_text(averaging(), colour=False, width=120)
    bars = line_of(text, "micro 2 x 2, 2 ranks")[2 + len("three steps, micro 2 x 2") :].split()[:2]
    assert [len(bar) for bar in bars] == [2, 2]
    single = line_of(text, "micro 1 x 8")
    assert "█" in single
    assert "▂" in single or "▁" in single
    assert "mean of micro-batch means" in single


def test_the_verdict_says_what_why_how_much_and_where():
    report = dropping()
    text = " ".join(report_text(report, colour=False, width=90).split())
    for sentence in report.verdict.sentences:
        assert sentence in text
    assert report.verdict.remedy in text
    assert "https://github.com/deepspeedai/DeepSpeed/issues/1" in text
    assert "deepspeed <0.18.0; the audited version is among them" in text
    assert report.not_told_apart[0] in text
    assert report.command in text
    assert "Cases with a fault: 2 of 7: micro 2 x 4; micro 1 x 8" in text
    lost = re.search(
        r"Gradient lost: (\d+)% \(by token role: first (\d+)%, body (\d+)%, end (\d+)%\) in micro 1 x 8", text
    )
    assert lost is not None
    # Six of eight rows lose first and end tokens.
    assert lost[2] == lost[4] == "75"


def test_the_command_is_never_broken_over_lines():
    report = replace(dropping(), command="thence audit deepspeed " + "--option value " * 20)
    assert report.command.strip() in report_text(report, colour=False, width=60)


def test_cases_that_were_not_judged_say_why_and_cannot_steer_the_terminal():
    text = report_text(dropping(), colour=False, width=120)
    assert "skipped: the stack has no rows laid end to end" in line_of(text, "packing")
    assert "not judged: 88% of the update" in line_of(text, "bfloat16")
    assert "failed: RuntimeError: boom" in line_of(text, "AdamW")
    coloured = report_text(dropping(), colour=True, width=120)
    assert "\x1b[" in coloured
    assert "\x1b[31m\x00" not in coloured
    assert "\x00" not in coloured


def test_markup_in_what_a_stack_says_is_not_obeyed():
    result = CaseResult(Case("odd [red]name[/red]"), "failed", "[bold]boom[/bold] :smile:")
    line = case_line(result).plain
    assert "odd [red]name[/red]" in line
    assert "[bold]boom[/bold] :smile:" in report_text(a_report([result], clean().verdict), colour=False, width=120)


def test_later_steps_have_lines_of_their_own_only_where_they_differ():
    case = Case("edge", 2, 4, steps=3, epochs=2)
    alike = judged(case, token_mean)
    assert case_line(alike).plain.count("\n") == 0
    assert "3 steps alike" in case_line(alike).plain
    mixed = Finding("window-mixed", "fault", "rows of two epochs in one step")
    third = a_step(case, token_mean, 3, (8, 9, 0, 1), mixed, objective="token-mean")
    lines = case_line(replace(alike, steps=(*alike.steps[:2], third))).plain.splitlines()
    assert len(lines) == 2
    assert "step 3" in lines[1]
    assert "windows mixed across epochs" in lines[1]
    assert lines[0].startswith("✗")
    assert not steps_alike(alike.steps[0], third)


@pytest.mark.parametrize("width", [60, 80])
def test_on_a_narrow_terminal_a_case_stands_above_its_figures_and_no_word_is_cut(width: int):
    case = Case("edge", 2, 4, steps=3, epochs=2)
    alike = judged(case, token_mean)
    mixed = Finding("window-mixed", "fault", "rows of two epochs in one step")
    third = a_step(case, token_mean, 3, (8, 9, 0, 1), mixed, objective="token-mean")
    report = dropping()
    report = replace(report, cases=(*report.cases, replace(alike, steps=(*alike.steps[:2], third))))
    text = report_text(report, colour=False, width=width)
    cases = text.split("\n\n")[1]
    assert max(map(len, cases.splitlines())) <= width
    lines = cases.splitlines()
    assert lines[0] == "  case"
    at = lines.index("✗ micro 2 x 4")
    assert lines[at + 1].startswith("    ▄··▄           0.00 to 1.00   0.53     first and last")
    said = " ".join(cases.split())
    for part in ("first and last micro-batch only", "skipped: the stack has no rows laid end to end", "windows mixed"):
        assert part in said
    assert "  step 3" in lines
    assert "✓ micro 8 x 1       " in report_text(report, colour=False, width=120)


def test_rows_whose_micro_batch_is_not_known_get_a_bar_each():
    step = judged(CASES[1], first_and_last_only).steps[0]
    rows = tuple(replace(row, micro_batch=None, rank=None) for row in step.sequences)
    groups = micro_batch_ratios(replace(step, sequences=rows))
    assert [round(group.ratio) for group in groups] == [1, 1, 0, 0, 0, 0, 1, 1]


def test_an_unknown_scale_and_weights_that_are_no_number_can_be_shown():
    result = judged(CASES[1], token_mean)
    step = result.steps[0]
    row = step.sequences[0]
    odd = tuple(replace(t, weight=float("nan"), ratio=float("nan")) for t in row.tokens)
    step = replace(step, scale=None, sequences=(replace(row, tokens=odd), *step.sequences[1:]))
    report = a_report([replace(result, steps=(step,))], clean().verdict)
    assert "?▄▄▄" in report_text(report, colour=False, width=120)
    page = Page.of(report)
    assert page.figures["rows"][0]["known"] is False
    assert page.figures["rows"][0]["cells"][0]["tokens"][1][0] is None
    assert "not known" in page.text


def test_lost_shares_by_role_leave_the_scale_of_the_update_aside():
    step = judged(CASES[1], lambda w: 3 * token_mean(w)).steps[0]
    assert set(lost_by_role(step).values()) == {0.0}


def test_junit_counts_cases_and_holds_the_weights_of_the_rows():
    report = dropping()
    suite = ElementTree.fromstring(junit_xml(report).encode()).find("testsuite")
    assert suite is not None
    assert {k: suite.get(k) for k in ("tests", "failures", "errors", "skipped")} == {
        "tests": "8",
        "failures": "2",
        "errors": "2",
        "skipped": "1",
    }
    tests = {test.get("name"): test for test in suite.iter("testcase")}
    assert len(tests) == 8
    failure = tests["micro 2 x 4"].find("failure")
    assert failure is not None
    assert "1.00 1.00 0.00 0.00 0.00 0.00 1.00 1.00" in failure.get("message", "")
    assert "example 3 (micro-batch 2): 0.00" in (failure.text or "")
    assert tests["micro 8 x 1"].find("failure") is None
    skipped, error = tests["packing, micro 1 x 1"].find("skipped"), tests["AdamW, micro 2 x 4"].find("error")
    assert skipped is not None
    assert skipped.get("message") == "the stack has no rows laid end to end"
    assert error is not None
    assert "</script><b>bold</b>" in error.get("message", "")


def test_choices_are_no_failures_in_junit():
    chosen = Finding("sequence-mean", "choice", "as the setting asks")
    case = replace(CASES[1], asked="sequence-mean")
    result = judged(case, OBJECTIVES["sequence-mean"].weights, chosen, objective="sequence-mean")
    suite = ElementTree.fromstring(junit_xml(a_report([result], clean().verdict))).find("testsuite")
    assert suite is not None
    assert suite.get("failures") == "0"
    assert "as the setting asks" in "".join(suite.itertext())
    assert case_line(result).plain.startswith("✓")

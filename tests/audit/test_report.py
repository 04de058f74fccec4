"""The terminal, the page and JUnit of an audit, on reports made by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from thence.audit.figures import lost_by_role, micro_batches, steps_alike
from thence.audit.judge.objectives import OBJECTIVES, StepRows
from thence.audit.junit import junit_xml
from thence.audit.report import Report
from thence.audit.result import (
    Case,
    CaseResult,
    Finding,
    PublicReport,
    Role,
    SequenceWeights,
    StepResult,
    TokenWeight,
    Verdict,
)
from thence.audit.text import case_line, report_text, verdict_text
from thence.pages.audit.heatmap import heat_map, shade
from thence.pages.audit.page import render_page, write_page

LENGTHS = (2, 34, 3, 21, 5, 13, 8, 4, 17, 6)
HOSTILE = "</script><b>bold</b>\x1b[31m\x00<img src=x onerror=alert(1)>"
Weights = Callable[[StepRows], np.ndarray]


def token_mean(window: StepRows) -> np.ndarray:
    return OBJECTIVES["token-mean"].weights(window)


def first_and_last_only(window: StepRows) -> np.ndarray:
    kept = (window.micro_batch == 0) | (window.micro_batch == window.micro_batch.max())
    return np.where(kept, token_mean(window), 0.0)


def mean_of_means(window: StepRows) -> np.ndarray:
    return OBJECTIVES["micro-batch-mean"].weights(window)


def a_row(example: int, micro_batch: int | None, rank: int | None, weight: float, ideal: float) -> SequenceWeights:
    length = LENGTHS[example]
    letters = "".join(chr(97 + (example * 7 + t * t) % 26) for t in range(length + 3))
    body: list[Role] = ["body"] * (length - 2)
    roles: list[Role] = ["prompt", "prompt", "prompt", "prompt", "first", *body, "end"]
    texts = [*letters[:3], "<|assistant|>", *letters[4 : 4 + length - 1], "<|end|>"]
    tokens = tuple(
        TokenWeight(text, role, *((0.0, 0.0, 0.0) if role == "prompt" else (weight, ideal, weight / ideal)))
        for text, role in zip(texts, roles, strict=True)
    )
    return SequenceWeights(example, micro_batch, rank, weight / ideal, tokens)


def a_step(
    case: Case,
    weights: Weights,
    index: int = 1,
    examples: Sequence[int] | None = None,
    *findings: Finding,
    objective: str,
) -> StepResult:
    rows = list(range(case.window) if examples is None else examples)
    at = np.arange(len(rows))
    micro_batch = at // (case.micro_batch * case.ranks)
    rank = at // case.micro_batch % case.ranks
    window = StepRows(np.array([LENGTHS[e] for e in rows]), micro_batch, rank)
    got, ideal = weights(window), token_mean(window)
    sequences = tuple(
        a_row(e, int(m), int(r), float(w), float(i))
        for e, m, r, w, i in zip(rows, micro_batch, rank, got, ideal, strict=True)
    )
    ratios, scale = got / ideal, float((got * window.lengths).sum())
    lost = float((ideal * window.lengths * np.clip(1 - ratios / scale, 0, None)).sum())
    mean = float((ratios * window.lengths).sum() / window.lengths.sum())
    roles = {"prompt": 0.0, "first": float(ratios.mean()), "body": mean, "end": float(ratios.mean())}
    return StepResult(
        index, objective, (), 3.1e-7, 2e-6, 41.2, 2e-3, scale, float(ratios.min()), float(ratios.max()), lost, roles,
        sequences, findings,
    )  # fmt: skip


def judged(case: Case, weights: Weights, *findings: Finding, objective: str = "token-mean") -> CaseResult:
    steps = tuple(a_step(case, weights, i + 1, None, *findings, objective=objective) for i in range(case.steps))
    return CaseResult(case, "judged", "", steps, seconds=1.25)


def a_report(cases: Sequence[CaseResult], verdict: Verdict, target: str = "trl") -> Report:
    return Report(
        target,
        {"trl": "1.16.0", "transformers": "5.23.0", "torch": "2.13.0", "python": "3.11.9"},
        f"thence audit {target} --python env/bin/python --seed 0",
        tuple(cases),
        verdict,
        (),
        {"model_type": "llama", "seed": 0, "examples": 12, "trained tokens": 127},
        "0.2.0",
        "2026-07-04T12:00:00Z",
        31.4,
    )


CASES = (
    Case("micro 8 x 1", 8, 1),
    Case("micro 2 x 4", 2, 4),
    Case("micro 1 x 8", 1, 8),
    Case("micro 2 x 2, 2 ranks", 2, 2, ranks=2),
    Case("three steps, micro 2 x 2", 2, 2, steps=3, epochs=2, lr=0.1),
)
LEFT = (
    CaseResult(Case("packing, micro 1 x 1", 1, 1, packing=True), "skipped", "the stack has no rows laid end to end"),
    CaseResult(Case("AdamW, micro 2 x 4", optimizer="adamw"), "failed", f"RuntimeError: boom {HOSTILE}", seconds=0.4),
    CaseResult(Case("bfloat16, micro 2 x 4", precision="bfloat16"), "not judged", "88% of the update is unexplained"),
)


def clean() -> Report:
    said = (
        "In all 5 judged cases the weights are those of the token mean, which was asked for.",
        "Token weights lie between 1.000 and 1.000 of what they should be.",
    )
    return a_report([judged(c, token_mean) for c in CASES], Verdict("no finding", "token-mean", "token-mean", said))


def dropping() -> Report:
    """Offload of the optimizer keeps the first and the last micro-batch only, where there are more than two."""
    lost = Finding("first-and-last-only", "fault", "only the first and the last micro-batch of 4 arrived")
    cases = [
        judged(CASES[0], token_mean),
        judged(CASES[1], first_and_last_only, lost),
        judged(CASES[2], first_and_last_only, lost),
        judged(CASES[3], token_mean),
        judged(CASES[4], token_mean),
        *LEFT,
    ]
    said = (
        "This trainer is asked for the token mean, but in 2 of 5 cases: first and last micro-batch only.",
        "The micro-batches between the first and the last never reach the optimizer.",
    )
    known = PublicReport(
        "zero2-cpu-offload",
        "deepspeed",
        "<0.18.0",
        "Install deepspeed 0.18.0 or later.",
        ("https://github.com/deepspeedai/DeepSpeed/issues/1", "javascript:alert(1)"),
        True,
    )
    verdict = Verdict("finding", "token-mean", "token-mean", said, "Switch the optimizer offload off.", (known,))
    report = a_report(cases, verdict, "deepspeed")
    return replace(report, not_told_apart=("Rank means and token means: no case with three ranks was judged.",))


def averaging() -> Report:
    """A mean of micro-batch means, in a tokenizer with hostile tokens."""
    mean = Finding("micro-batch-mean", "fault", "token weights run from 0.32 to 6.12 of the ideal")
    cases = [judged(CASES[0], token_mean)]
    cases += [judged(c, mean_of_means, mean, objective="micro-batch-mean") for c in CASES[1:]]
    step = cases[0].steps[0]
    row = step.sequences[0]
    tokens = (*row.tokens[:-1], replace(row.tokens[-1], text=HOSTILE))
    hostile = replace(step, sequences=(replace(row, tokens=tokens), *step.sequences[1:]))
    cases[0] = replace(cases[0], steps=(hostile,))
    said = ("The weights are a mean of micro-batch means.", "Short responses are over-weighted.")
    return a_report(cases, Verdict("finding", "micro-batch-mean", "token-mean", said, "Count the tokens first."))


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
    assert "Cases with a fault: 2 of 5 judged: micro 2 x 4; micro 1 x 8" in text
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


def test_rows_whose_micro_batch_is_not_known_get_a_bar_each():
    step = judged(CASES[1], first_and_last_only).steps[0]
    rows = tuple(replace(row, micro_batch=None, rank=None) for row in step.sequences)
    groups = micro_batches(replace(step, sequences=rows))
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


class Page(HTMLParser):
    """What a browser would see of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.text = ""
        self.source = ""
        self.figures: dict[str, Any] = {}
        self._inside = ""

    @classmethod
    def of(cls, report: Report) -> Page:
        page = cls()
        page.source = render_page(report)
        page.feed(page.source)
        page.figures = json.loads(page.scripts[0])
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            (self.scripts if self._inside == "script" else self.styles).append(data)
        else:
            self.text += data

    def cells(self, row: int) -> list[str]:
        """Classes of the cells of a row of the heat map, in order."""
        part = self.source.split(f'data-row="{row}"')[1].split('data-row="')[0].split("</section>")[0]
        return [kind.split()[0] for kind in re.findall(r'<i class="([^"]+)"></i>', part)]


@pytest.mark.parametrize("make", [clean, dropping, averaging])
def test_the_page_loads_nothing_from_anywhere(make: Callable[[], Report]):
    page = Page.of(make())
    loading = [
        (tag, a) for tag, a in page.tags if a.keys() & {"src", "srcset", "data", "poster", "action"} or tag == "link"
    ]
    assert loading == []
    assert not re.search(r"url\(|@import", page.styles[0])
    assert not re.search(r"fetch\(|XMLHttp|import\(", page.scripts[1])
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    assert all(link and link.startswith("https://github.com/") for link in links)


def test_the_page_says_the_verdict_first_and_how_to_repeat_it():
    report = dropping()
    page = Page.of(report)
    order = [
        report.verdict.sentences[0],
        "What was measured",
        report.verdict.remedy,
        "publicly reported",
        "What was found",
    ]
    places = [page.text.index(said) for said in order]
    assert places == sorted(places)
    assert report.command in page.text
    assert "the audited version is affected" in page.text
    assert "88% of the update is unexplained" in page.text
    assert report.not_told_apart[0] in page.text
    for objective in OBJECTIVES.values():
        assert objective.formula in page.text


@pytest.mark.parametrize("make", [dropping, averaging])
def test_hostile_text_stays_text(make: Callable[[], Report]):
    page = Page.of(make())
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert len(page.scripts) == 2
    assert not any(name.startswith("on") for _, a in page.tags for name in a)
    assert not any((a.get("href") or "").startswith("javascript:") for _, a in page.tags)
    assert "\x1b" not in page.source
    assert "\x00" not in page.source
    if make is averaging:
        assert any("</script><b>" in column[1] for column in page.figures["columns"])
    else:
        assert "</script><b>bold</b>" in page.text


def test_the_heat_map_marks_what_was_thrown_away_and_where_micro_batches_begin():
    report = dropping()
    page, view = Page.of(report), heat_map(report)
    widths = [1 + length for length in LENGTHS[:8]]
    assert len(page.cells(0)) == sum(widths) == len(page.figures["columns"])
    assert set(page.cells(0)) == {"q", "k0"}
    gone = page.cells(1)[sum(widths[:2]) : sum(widths[:6])]
    assert gone.count("z") == sum(LENGTHS[2:6])
    assert set(page.cells(1)[: sum(widths[:2])]) == {"q", "k0"}
    assert [b.label for b in view.rows[1].blocks] == ["1", "", "2", "", "3", "", "4", ""]
    assert [b.label for b in view.rows[3].blocks] == ["1·1", "", "2·1", "", "1·2", "", "2·2", ""]


def test_every_cell_has_its_figures():
    figures = Page.of(averaging()).figures
    row = next(r for r in figures["rows"] if r["case"] == "micro 1 x 8")
    # Alone in its micro-batch a row gets 1/8; asked for is its share of 90 tokens.
    ratio, weight, ideal = row["cells"][0]["tokens"][1]
    assert weight == pytest.approx(1 / 16, rel=1e-3)
    assert ideal == pytest.approx(1 / 90, rel=1e-3)
    assert ratio == pytest.approx(90 / 16, rel=1e-3)
    assert row["cells"][1]["at"] == "micro-batch 2"
    assert sum(len(cell["tokens"]) for cell in row["cells"]) == len(figures["columns"])


def test_prompts_are_drawn_token_by_token_only_if_one_is_trained():
    result = judged(CASES[1], token_mean)
    narrow = heat_map(a_report([result], clean().verdict))
    assert [e.asked for e in narrow.examples] == [1] * 8
    step = result.steps[0]
    trained = tuple(
        replace(row, tokens=tuple(replace(t, weight=0.01, ratio=0.9) if t.role == "prompt" else t for t in row.tokens))
        for row in step.sequences
    )
    wide = heat_map(a_report([replace(result, steps=(replace(step, sequences=trained),))], clean().verdict))
    assert [e.asked for e in wide.examples] == [4] * 8
    assert wide.rows[0].blocks[0].shades[:4] == ("x",) * 4


def test_examples_that_a_step_does_not_hold_stay_empty():
    case = Case("edge", 2, 2, steps=2)
    steps = (a_step(case, token_mean, 1, (0, 1, 2, 3), objective="token-mean"),)
    steps += (a_step(case, token_mean, 2, (4, 5, 0, 0), objective="token-mean"),)
    view = heat_map(a_report([CaseResult(case, "judged", "", steps)], clean().verdict))
    assert [e.number for e in view.examples] == [1, 2, 3, 4, 5, 6]
    assert set(view.rows[1].blocks[1].shades) == {"e"}
    assert view.rows[1].data["cells"][0]["copies"] == 2
    assert view.rows[1].data["cells"][1] is None


def test_shades_are_neutral_at_the_ideal_and_grow_with_the_factor():
    assert shade(1.001, 1.0, 0.02, 0.005) == "k0"
    assert shade(0.01, 1.0, 0.02, 0.005) == "z"
    assert shade(0.01, 0.0, 0.02, 0.005) == "q"
    assert shade(-0.5, 1.0, 0.02, 0.005) == "n"
    over = [int(shade(r, 1.0, 0.02, 0.005)[1:]) for r in (1.02, 1.2, 1.5, 2, 3, 5, 8, 80)]
    less = [int(shade(1 / r, 1.0, 0.001, 0.005)[1:]) for r in (1.02, 1.2, 1.5, 2, 3, 5, 8, 80)]
    assert over == less == sorted(over)
    assert over[-2:] == [12, 12]
    assert len(set(over)) == 7


def test_a_report_without_a_judged_case_still_makes_a_page():
    said = ("None of the 3 cases could be judged.", "The first reason: the stack has no rows laid end to end.")
    report = a_report(LEFT, Verdict("cannot judge", None, "token-mean", said))
    page = Page.of(report)
    assert "no case could be judged" in page.text
    assert said[1] in page.text
    assert "could not be judged" in verdict_text(report).plain


def test_the_page_is_replaced_as_a_whole(tmp_path: Path):
    path = tmp_path / "audit.html"
    path.write_text("old", encoding="utf-8")
    write_page(clean(), path)
    assert path.read_text(encoding="utf-8").endswith("</html>")
    assert [p.name for p in tmp_path.iterdir()] == ["audit.html"]


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

"""The page of an audit, on reports made by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.audit.made_reports import (
    CASES,
    HOSTILE,
    LEFT,
    LENGTHS,
    Page,
    a_report,
    a_step,
    averaging,
    clean,
    dropping,
    judged,
    token_mean,
)
from thence.audit.objectives import OBJECTIVES
from thence.audit.policy.objective import PolicyObjective
from thence.audit.report import Report
from thence.audit.result import (
    AuditVerdict,
    Case,
    CaseResult,
    PolicyCheck,
)
from thence.audit.text import verdict_text
from thence.pages.audit.heatmap import heat_map, shade
from thence.pages.audit.page import write_page
from thence.pages.audit.policy import policy_table


@pytest.mark.parametrize("make", [clean, dropping, averaging])
def test_the_page_loads_nothing_from_anywhere(make: Callable[[], Report]):
    page = Page.of(make())
    loading = [
        (tag, a) for tag, a in page.tags if a.keys() & {"src", "srcset", "data", "poster", "action"} or tag == "link"
    ]
    assert loading == []
    assert not re.search(r"url\(|@import", page.styles[0])
    assert not re.search(r"fetch\(|XMLHttp|import\(", "".join(page.scripts[1:]))
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    assert all(link and link.startswith("https://github.com/") for link in links)


def test_the_page_says_the_verdict_first_and_how_to_repeat_it():
    report = dropping()
    page = Page.of(report)
    order = [
        report.verdict.sentences[0],
        "What was measured",
        report.verdict.remedy,
        "known for",
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
    assert len(page.scripts) == 3
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
    report = a_report(LEFT, AuditVerdict("cannot judge", None, "token-mean", said))
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


def test_an_objective_of_reinforcement_learning_has_a_row_with_what_was_found_and_not_verified():
    asked = PolicyObjective(kl=0.5, normaliser="sequence-mean", clip_high=0.28)
    clear = PolicyCheck(asked.plain(), ("ratio", "KL coefficient"), {"rows": HOSTILE, "groups": HOSTILE})
    other = PolicyCheck(PolicyObjective().plain(), found=(f"no clip {HOSTILE}",), others=("no step is taken",))
    base = clean()
    cases = [
        replace(base.cases[0], case=replace(base.cases[0].case, name=name), policy=check)
        for name, check in (("RL: clear", clear), ("RL: other", other))
    ]
    report = replace(base, cases=(*cases, *base.cases[1:]))
    page = Page.of(report)
    rows = {row.label: [(cell.text, cell.sub) for cell in row.cells] for row in policy_table(report).rows}
    assert rows["RL: clear"][:3] == [
        ("as asked", ""),
        ("clip_high 0.28, kl 0.5, normaliser sequence-mean", ""),
        ("ratio, KL coefficient", ""),
    ]
    assert rows["RL: clear"][3][0].startswith("rows, groups (")
    assert rows["RL: other"][:2] == [(f"no clip {HOSTILE}", "or: no step is taken"), ("plain GRPO", "")]
    assert "Objectives of reinforcement learning" in page.text
    assert not any(tag == "img" for tag, _ in page.tags)
    assert "Objectives of reinforcement learning" not in Page.of(base).text

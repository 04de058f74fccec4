"""What page, terminal and files say of contrasts and of where the order of arms turns."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import vl_convert
from rich.console import Console

from tests.compare.blocks import contrast, make_blocks
from tests.compare.test_decisions import ARMS, CONTRASTS
from thence.compare.registration import Registration, sha256_of
from thence.compare.result import Comparison, results_json
from thence.compare.sections import read_section, sections_of
from thence.compare.statistics import Statistics, statistics
from thence.pages.comparison.decided import contrasts_table, crossing_cell, decided_text, turning_table
from thence.pages.comparison.figures import section_figures
from thence.pages.comparison.outcome import outcome
from thence.pages.comparison.page import print_comparison, render_page, write_page
from thence.pages.comparison.words import notes
from thence.pages.figure import LIGHT, still
from thence.stats.trend import Crossing

HOSTILE = "</script><script>alert(1)</script> \u202etxt"
AGAINST = read_section({"kind": "against-covariate"})


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return make_blocks(ARMS, contrasts=CONTRASTS)


@pytest.fixture(scope="module")
def found(comparison: Comparison) -> Statistics:
    return statistics(comparison, 50)


def test_verdicts_stand_with_difference_interval_and_blocks(found: Statistics) -> None:
    rows = {row.label: row for row in contrasts_table(found).rows}
    verdict, difference, p, blocks = rows["Correct SFT beats SFT with the bug"].cells
    [decision] = [d for d in found.decisions.contrasts if d.contrast.name == "correct"]
    assert decision.estimate is not None and decision.low is not None and decision.high is not None
    shown = f"+{100 * decision.estimate:.1f} [+{100 * decision.low:.1f}, +{100 * decision.high:.1f}]"
    assert (verdict.text, verdict.strong, difference.text, difference.sub) == ("held", True, shown, "test")
    assert p.sub == "equal 1.00" and blocks.text == "24"
    assert rows["SFT less SAME"].cells[0].sub == "within ±3"
    slope = rows["Slope of RL less SFT"].cells
    [decision] = [d for d in found.decisions.contrasts if d.contrast.name == "turns"]
    assert slope[1].text.startswith(f"+{10 * (decision.estimate or 0):.1f} ") and slope[3].sub == "slope"
    assert rows["RL less SFT"].cells[3].text == "12" and rows["RL less SFT"].cells[3].sub == "upper"
    assert [row.group for row in rows.values()] == ["Primary"] * 4 + ["Exploratory"] * 2


def test_what_is_not_finished_is_not_tested_and_the_reason_stands_below(comparison: Comparison) -> None:
    runs = tuple(run for run in comparison.runs if (run.arm, run.base) != ("bug", "b3"))
    table = contrasts_table(statistics(replace(comparison, runs=runs), 50))
    cells = table.rows[0].cells
    assert [cell.text for cell in cells] == ["not tested", "–", "–", "23/24"]
    assert any("23 of 24 blocks: not tested, since no look was planned" in note for note in table.notes)


def test_no_difference_is_shown_before_a_registered_comparison_is_finished(comparison: Comparison) -> None:
    design = {"seeds": [0]}
    registration = Registration("2026-01-01T00:00:00+00:00", "", sha256_of(design), design)
    runs = tuple(run for run in comparison.runs if (run.arm, run.base) != ("bug", "b3"))
    sealed = statistics(replace(comparison, runs=runs, pending=1, registration=registration), 50)
    assert not sealed.differences and sealed.estimates
    assert "Differences are shown when all runs are finished" in outcome(sealed)
    assert not any(word in outcome(sealed) for word in ("higher", "lower", "told apart"))
    assert turning_table(AGAINST, sealed) is None and not section_figures(AGAINST, sealed)
    assert any("No difference is shown before" in note for note in notes(sealed))
    finished = statistics(replace(comparison, registration=registration), 50)
    assert finished.differences and "compared with" in outcome(finished).lower()


def test_too_few_blocks_to_decide_anything_are_said() -> None:
    few = make_blocks(ARMS, blocks=4, contrasts=(contrast("c", "sft", "bug"),))
    table = contrasts_table(statistics(few, 50))
    assert any("no p value below 0.12" in note and "more blocks" in note for note in table.notes)
    assert "[" not in table.rows[0].cells[1].text


def test_the_outcome_begins_with_the_primary_verdicts(found: Statistics, comparison: Comparison) -> None:
    said = outcome(found)
    assert said.startswith("4 of 4 primary contrasts decided. Correct SFT beats SFT with the bug: held; BUG less SFT:")
    assert decided_text(statistics(replace(comparison, contrasts=()), 50)) == ""


def test_slope_and_crossing_of_each_arm_are_listed(found: Statistics) -> None:
    table = turning_table(AGAINST, found)  # type: ignore[arg-type]
    assert table is not None
    rows = {row.label: row.cells for row in table.rows}
    assert list(rows) == ["BUG", "SAME", "RL"] and {row.group for row in table.rows} == {"test"}
    assert rows["BUG"][2].text == "none in the range"
    assert rows["RL"][1].text[0] == "+" and 30 < int(rows["RL"][2].text.split()[0]) < 42
    assert "nothing is said beyond" in table.notes[0] and "reliability" in table.notes[1]


@pytest.mark.parametrize(
    ("crossing", "text", "sub"),
    [
        (Crossing(0.312, 0.24, 0.4, False, False), "31 [24, 40]", ""),
        (Crossing(0.3, 0.05, 0.4, True, False), "30 [below 5, 40]", ""),
        (Crossing(0.3, 0.05, 0.6, True, True), "30 [below 5, above 60]", ""),
        (Crossing(None, None, None, False, False), "none in the range", ""),
        (Crossing(None, 0.5, 0.6, False, True), "none in the range", "not ruled out:\n[50, above 60]"),
    ],
)
def test_a_crossing_is_said_with_what_is_not_ruled_out(crossing: Crossing, text: str, sub: str) -> None:
    cell = crossing_cell(crossing)
    assert (cell.text, cell.sub) == (text, sub)


def test_the_figure_has_blocks_bands_and_the_crossing_and_draws(found: Statistics) -> None:
    [figure] = section_figures(AGAINST, found)
    assert [key.name for key in figure.keys] == ["BUG", "SAME", "RL"] and len(figure.charts) == 1
    rows = figure.charts[0].spec["data"]["values"]
    parts = {part: [row for row in rows if row["part"] == part] for part in ("block", "line", "monotone", "at")}
    assert len(parts["block"]) == 3 * 24 and len(parts["line"]) == len(parts["monotone"]) == 3 * 61
    assert all(row["lo"] <= row["y"] <= row["hi"] for row in parts["line"])
    [crossing] = [row for row in parts["at"] if row["name"] == "RL"]
    assert crossing["lo"] < crossing["x"] < crossing["hi"] and crossing["y"] == 0
    drawing = vl_convert.vegalite_to_svg(still(figure.charts[0].spec, LIGHT))
    assert drawing.count("<path") > 3 * 24 and "accuracy before training, %" in drawing


def test_a_section_chooses_arms_test_sets_and_blocks(found: Statistics) -> None:
    chosen = {"arms": ["rl"], "to": "bug", "columns": ["dev", "test"], "bases": [f"b{i}" for i in range(9)]}
    [figure] = section_figures(read_section({"kind": "against-covariate", **chosen}), found)
    assert len(figure.charts) == 2 and "difference to BUG" in figure.charts[0].words
    rows = figure.charts[0].spec["data"]["values"]
    assert len([row for row in rows if row["part"] == "block"]) == 9


def test_too_few_blocks_are_drawn_without_a_line(comparison: Comparison) -> None:
    few = make_blocks(ARMS, blocks=3)
    [figure] = section_figures(AGAINST, statistics(few, 50))
    assert {row["part"] for row in figure.charts[0].spec["data"]["values"]} == {"block"}
    nothing = replace(comparison, runs=())
    assert section_figures(AGAINST, statistics(nothing, 50)) == []


def test_a_comparison_with_contrasts_shows_them_first(comparison: Comparison) -> None:
    kinds = [section.kind for section in sections_of(comparison)]
    assert kinds[:3] == ["contrasts", "against-covariate", "score-against-flops"]
    assert "contrasts" not in [s.kind for s in sections_of(replace(comparison, contrasts=(), covariate={}))]


def test_page_and_files_have_the_verdicts(tmp_path: Path, comparison: Comparison) -> None:
    only = tuple({"kind": kind} for kind in ("contrasts", "against-covariate"))
    (tmp_path / "results.json").write_text(results_json(replace(comparison, sections=only)))
    text = write_page(tmp_path).read_text()
    assert "What was to be decided" in text and "Where the order turns" in text and "contrasts.csv" in text
    assert 'class="of-base"' not in text  # so that the choice of a base does not hide them
    rows = list(csv.DictReader(io.StringIO((tmp_path / "contrasts.csv").read_text())))
    assert [(row["name"], row["verdict"]) for row in rows][:2] == [("correct", "held"), ("wrong", "refuted")]
    assert float(rows[0]["p_corrected"]) < 0.05 and rows[0]["blocks_planned"] == "24"
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["contrasts"][0]["verdict"] == "held" and len(content["contrasts"][0]["blocks"]) == 24
    best = next(row for row in content["contrasts"] if row["name"] == "best")
    assert {block["other"] for block in best["blocks"]} == {"bug", "rl"}
    assert 0.9 < content["covariate"]["reliability"] < 1 and len(content["covariate"]["blocks"]) == 24
    crossing = next(row for row in content["against_covariate"] if row["arm"] == "rl")["line"]["crossing"]
    assert crossing["low"] < crossing["at"] < crossing["high"]


def test_a_comparison_without_contrasts_has_none_in_its_files(tmp_path: Path, comparison: Comparison) -> None:
    (tmp_path / "results.json").write_text(results_json(replace(comparison, contrasts=(), covariate={})))
    assert "contrasts.csv" not in write_page(tmp_path).read_text()
    assert not (tmp_path / "contrasts.csv").exists()
    assert not {"contrasts", "covariate"} & set(json.loads((tmp_path / "report.json").read_text()))


def test_hostile_words_of_a_contrast_are_shown_and_do_nothing(comparison: Comparison) -> None:
    asked = (contrast("c", "sft", "bug", says=HOSTILE),)
    covariate = {**comparison.covariate, "title": HOSTILE}
    text = render_page(statistics(replace(comparison, contrasts=asked, covariate=covariate), 50))
    assert "<script>alert(1)" not in text and "\u202e" not in text


def test_the_terminal_shows_verdicts_within_80_columns(found: Statistics) -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    print_comparison(found, console, kinds={"contrasts", "against-covariate"})
    text = console.export_text()
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
    assert "further columns" not in text and text.count("held") >= 3 and "Where the order turns" in text
    assert "\ntest\n" in "\n".join(line.rstrip() for line in text.splitlines())

"""Report of a comparison: what its page, tables, figures and files say, finished or not."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import vl_convert
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.compare.comparisons import COLUMNS, make_comparison
from thence.compare.result import Arm, Comparison, Failure, results_json
from thence.compare.sections import read_section, sections_of
from thence.compare.statistics import Statistics, statistics
from thence.errors import RecipeError, UserError
from thence.foreign_text import visible
from thence.pages.comparison.figures import section_figures
from thence.pages.comparison.outcome import outcome
from thence.pages.comparison.page import print_comparison, render_page, shown_sections, write_page
from thence.pages.comparison.points import label_places
from thence.pages.comparison.series import dynamics_series
from thence.pages.comparison.tables import section_tables
from thence.pages.comparison.words import notes
from thence.pages.table import Table

HOSTILE = "</td><script>alert(1)</script>{{ 7 * 7 }} \u202etxt"
FAULTS = ("first-micro-batch-only", "mean-of-means")


def sft(name: str, title: str, *fault: str, accumulation: int = 0) -> Arm:
    return Arm(name, title, "SFT", kind="sft", method="sft", fault=fault, accumulation=accumulation)


ARMS = (
    Arm("long", "SFT then RL", "RL", after="clean", kind="rl", method="grpo", paper={"rich": 57.0}),
    Arm("short", "SFT then RL, short", "RL", after="clean", kind="rl", method="grpo"),
    Arm("luffy", "LUFFY", "Mixed", kind="rl", method="luffy", reconstruction=True),
    sft("clean", "SFT"),
    sft("first-4", "SFT, first only", FAULTS[0], accumulation=4),
    sft("first-16", "SFT, first only of 16", FAULTS[0], accumulation=16),
    sft("means-4", "SFT, mean of means", FAULTS[1], accumulation=4),
    sft("both", "SFT, both bugs", *FAULTS, accumulation=4),
    Arm("base", "Base"),
)
EFFECTS = {"long": 0.5, "short": 0.4, "luffy": -0.6, "clean": 0.0, "first-4": -0.8, "first-16": -1.4}
EFFECTS |= {"means-4": -0.1, "both": -1.0, "base": -2.5}
SECTIONS = (
    {"kind": "methods"},
    {"kind": "waterfall", "arms": ["both", "first-4", "means-4", "clean"]},
    {"kind": "sensitivity", "title": "Settings", "arms": ["clean", "luffy"], "to": "clean"},
    {"kind": "sensitivity", "x": "accumulation", "to": "clean", "arms": ["clean", "first-4", "first-16", "means-4"]},
    {"kind": "cost"},
    {"kind": "short", "pairs": [["short", "long"]]},
    {"kind": "score-against-flops", "flops": "executed"},
    {"kind": "training", "arms": ["clean", "both"]},
    {"kind": "dynamics", "smooth": 4},
    {"kind": "tuning"},
)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    costs = {name: {"base": 0.0, "short": 3e11, "luffy": 1.2e12}.get(name, 1e12) for name in EFFECTS}
    return make_comparison(EFFECTS, arms=ARMS, bases=("rich", "poor"), seeds=4, problems=120, flops=costs)


@pytest.fixture(scope="module")
def page(found: Statistics) -> str:
    return render_page(found)


@pytest.fixture(scope="module")
def found(comparison: Comparison) -> Statistics:
    return statistics(replace(comparison, sections=SECTIONS), replicates=300)


def tables(found: Statistics, **section: object) -> list[Table]:
    return section_tables(read_section(section), found)


def number(text: str) -> float:
    match = re.match(r"[-+−]?[\d.]+", text)
    assert match, text
    return float(match[0].replace("−", "-"))


class Page(HTMLParser):
    """Tags of a page, whether they nest, and the texts in bold table cells."""

    void = frozenset({"meta", "br", "link"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.bold: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if "td" in self.open:
            self.cells[-1] += data
            if "b" in self.open:
                self.bold.append(data)


def test_report_is_written_beside_the_results(tmp_path: Path, comparison: Comparison):
    (tmp_path / "results.json").write_text(results_json(replace(comparison, sections=SECTIONS[:2])))
    assert write_page(tmp_path) == tmp_path / "report.html"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "report.html",
        "report.json",
        "results.json",
        "runs.csv",
        "summary.csv",
    ]


def test_page_needs_nothing_else(page: str):
    read = Page(page)
    assert not read.open
    assert not {"img", "link", "iframe"} & {tag for tag, _ in read.tags}
    for _, attributes in read.tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")


def test_page_escapes_what_recipes_and_failures_say(comparison: Comparison):
    arms = (*comparison.arms[:-1], replace(comparison.arms[-1], title=HOSTILE))
    failures = (Failure("base", "rich", 3, HOSTILE),)
    hostile = replace(comparison, arms=arms, failures=failures, description=HOSTILE, sections=SECTIONS[6:7])
    text = render_page(statistics(hostile, 100))
    body = text[: text.index('<script type="module">')]
    assert "<script>" not in body and "\u202e" not in body and "[U+202E]" in body and "{{ 7 * 7 }}" in body
    assert not Page(text).open
    for spec in specs(text):
        assert any(row["arm"] == visible(HOSTILE) for row in spec["data"]["values"])
    assert len(specs(text)) == 2


def specs(page: str) -> list[dict]:
    """The specifications of a page's charts."""
    found = re.findall(r'<script type="application/json" class="spec">(.*?)</script>', page, re.DOTALL)
    return [json.loads(text) for text in found]


def test_vega_accepts_every_chart_and_colours_are_those_of_the_page(page: str):
    found = specs(page)
    assert page.count('role="img"') == len(found) == 14
    for spec in found:
        said = json.dumps(spec)
        assert "var(--series-0)" in said and "#" not in said
        vl_convert.vegalite_to_vega(spec)
    assert "prefers-color-scheme: dark" in page


def test_arms_can_be_switched_off_and_a_name_stands_for_one_arm_only(comparison: Comparison):
    arms = (comparison.arms[0], replace(comparison.arms[1], title=comparison.arms[0].title), *comparison.arms[2:])
    found = statistics(replace(comparison, arms=arms), 100)
    figure = section_figures(read_section({"kind": "dynamics"}), found)[0]
    names = [key.name for key in figure.keys]
    assert len(names) == len(set(names)) and "SFT then RL (long)" in names and "SFT then RL (short)" in names
    for chart in figure.charts:
        assert {"name": "off", "value": []} in chart.spec["params"]
        assert {row["name"] for row in chart.spec["data"]["values"]} <= set(names)


def test_nothing_is_bold_without_significance():
    alike = make_comparison({name: 0.0 for name in ("ref", "a", "b", "c")}, problems=60)
    read = Page(render_page(statistics(alike, 300)))
    assert read.cells and not read.bold


def test_bold_goes_with_a_star(found: Statistics):
    shown = [table for section in sections_of(found.comparison) for table in section_tables(section, found)]
    cells = [cell for table in shown for row in table.rows for cell in row.cells]
    assert any(cell.strong for cell in cells)
    for cell in cells:
        assert cell.strong == (cell.text + cell.sub).endswith("*")


def test_methods_table_has_the_statistics_of_each_cell(found: Statistics):
    table = tables(found, kind="methods")[1]
    assert table.title == "poor"
    row = next(row for row in table.rows if row.label.startswith("LUFFY"))
    key = ("luffy", "poor", COLUMNS[1])
    assert number(row.cells[1].text) == pytest.approx(100 * found.estimates[key].mean, abs=0.051)
    assert number(row.cells[1].sub) == pytest.approx(100 * found.differences[key].mean, abs=0.051)


def test_papers_numbers_stand_beside_where_the_base_has_them(found: Statistics):
    rich, poor = tables(found, kind="methods")
    assert "other models and data" in rich.headers[-1] and len(poor.headers) == len(rich.headers) - 1
    assert next(row for row in rich.rows if row.label == "SFT then RL").cells[-1].text == "57.0"
    assert any("cannot be compared" in note for note in rich.notes)


def test_reconstructions_are_labelled_in_every_table_and_figure(found: Statistics):
    for section in ({"kind": "methods"}, {"kind": "cost"}, {"kind": "tuning"}, SECTIONS[2]):
        for table in tables(found, **section):
            assert [row.label for row in table.rows if "LUFFY" in row.label] == ["LUFFY (reconstruction)"]
    assert "LUFFY (reconstruction)" in str(
        section_figures(read_section({"kind": "score-against-flops"}), found)[0].charts[0].spec
    )
    assert any("(reconstruction)" in key.name for key in section_figures(read_section(SECTIONS[8]), found)[0].keys)


def test_waterfall_steps_and_differences_to_the_clean_arm(found: Statistics):
    table = tables(found, **SECTIONS[1])[0]
    assert [row.label for row in table.rows] == ["SFT, both bugs", "SFT, first only", "SFT, mean of means", "SFT"]
    scores = [number(row.cells[0].text) for row in table.rows]
    for index, row in enumerate(table.rows[:-1]):
        assert number(row.cells[0].sub) == pytest.approx(scores[index] - scores[-1], abs=0.11)
    for index, row in list(enumerate(table.rows))[1:]:
        assert number(row.cells[-1].text) == pytest.approx(scores[index] - scores[index - 1], abs=0.11)
    assert table.rows[0].cells[-1].text == "–" and table.rows[-1].cells[0].sub == "clean"


def test_sweep_has_a_line_for_each_fault(found: Statistics):
    table = tables(found, **SECTIONS[3])[0]
    assert table.headers == ("", "accumulation = 4", "accumulation = 16", "any")
    shown = {row.label: [cell.text != "–" for cell in row.cells] for row in table.rows}
    assert shown == {
        "no fault": [False, False, True],
        FAULTS[0]: [True, True, False],
        FAULTS[1]: [True, False, False],
    }
    figure = section_figures(read_section(SECTIONS[3]), found)[0]
    assert [key.name for key in figure.keys] == ["no fault", *FAULTS]


def test_cost_of_the_way_and_its_ratio(found: Statistics):
    rows = {row.label: [cell.text for cell in row.cells] for row in tables(found, kind="cost")[0].rows}
    assert "Base" not in rows
    assert rows["SFT then RL, short"][3:6] == ["3.00e11", "0.30", "3.90e11"]


def test_short_against_long(found: Statistics):
    rows = tables(found, **SECTIONS[5])[0].rows
    assert [row.label for row in rows] == ["SFT then RL, short", "SFT then RL", "longer less shorter"]
    short, long, less = (number(row.cells[1].text) for row in rows)
    assert less == pytest.approx(long - short, abs=0.11)


def test_tuning_says_what_was_tried_and_what_lies_at_the_edge(found: Statistics):
    table = tables(found, kind="tuning")[0]
    row = next(row for row in table.rows if row.label == "SFT")
    assert [cell.text for cell in row.cells] == ["1", "lr = 0.0004", "34.0", "lr = 0.0001: 31.0; lr = 0.0002: 32.0"]
    assert any("edge" in note for note in table.notes)


def test_papers_table_is_labelled_and_kept_apart(found: Statistics):
    paper = {
        "source": "arXiv 0000.00000, Table 2",
        "columns": ["A", "avg"],
        "rows": {"clean": [60, 54.0], "x": ["", 1]},
    }
    shown = tables(found, kind="waterfall", arms=["both", "clean"], paper=paper)[-1]
    assert shown.paper and "arXiv 0000.00000, Table 2" in shown.title and "cannot be compared" in shown.notes[0]
    assert [(row.label, [cell.text for cell in row.cells]) for row in shown.rows] == [
        ("SFT", ["60", "54"]),
        ("x", ["–", "1"]),
    ]


def test_dynamics_are_mean_and_range_over_seeds(found: Statistics):
    section = read_section({"kind": "dynamics"})
    arm = found.comparison.arm("luffy")
    series = dynamics_series(section, found.comparison, arm, "rich", "reward")  # type: ignore[arg-type]
    curves = [run.curve["reward"] for run in found.comparison.runs_of("luffy", "rich")]
    first = [curve[0] for curve in curves]
    assert series is not None and series.seeds == (0, 1, 2, 3)
    assert (series.mean[0], series.low[0], series.high[0]) == pytest.approx((sum(first) / 4, min(first), max(first)))


def test_outcome_names_what_differs_and_what_does_not(found: Statistics):
    said = outcome(found)
    assert "Compared with SFT then RL on test, T = 0.6 (4 seeds, 120 problems × 2 samples)" in said
    assert "none significantly higher" in said and "SFT then RL, short" in said
    assert "embedded world" not in said


def test_outcome_owns_up_to_the_embedded_world(comparison: Comparison):
    bases = {"bases": {"rich": "world:chain/rich", "poor": "world:chain/poor"}}
    assert "embedded world" in outcome(statistics(replace(comparison, environment=bases), 100))


def test_the_page_shows_the_command_as_it_was_typed_and_no_tag_of_it(comparison: Comparison):
    typed = {"command": "thence compare 'mine <b>.toml' --jobs 2", "thence": "0.1.0"}
    text = render_page(statistics(replace(comparison, environment=typed), 100))
    assert "Reproduce it" in text and "<pre>thence compare &#39;mine &lt;b&gt;.toml&#39; --jobs 2</pre>" in text
    assert "Reproduce it" not in render_page(statistics(replace(comparison, environment={}), 100))


def test_budgets_not_reached_or_exceeded_are_said(found: Statistics):
    said = [note for note in notes(found) if "budget" in note]
    assert len(said) == 2
    assert "did not reach" in said[0] and "SFT then RL, short (30%)" in said[0] and "LUFFY" not in said[0]
    assert "went over" in said[1] and "LUFFY (reconstruction) (120%)" in said[1] and "Base" not in "".join(said)


def test_unfinished_comparison_says_so(tmp_path: Path, comparison: Comparison):
    part = tuple(run for run in comparison.runs if run.arm in ("long", "clean") and run.seed < 2)
    failed = (Failure("luffy", "rich", 1, "loss not finite at step 3"),)
    unfinished = replace(comparison, runs=part, pending=7, failures=failed, sections=SECTIONS)
    (tmp_path / "results.json").write_text(results_json(unfinished))
    text = write_page(tmp_path).read_text()
    assert "7 runs are still to come" in text and "loss not finite at step 3" in text and "So far" in text
    assert "SFT (2 of 4)" in text


def test_comparison_without_any_run_still_has_a_report(tmp_path: Path, comparison: Comparison):
    empty = replace(comparison, runs=(), tries=(), pending=72, sections=SECTIONS)
    (tmp_path / "results.json").write_text(results_json(empty))
    assert "No arm can be compared with SFT then RL yet." in write_page(tmp_path).read_text()
    assert json.loads((tmp_path / "report.json").read_text())["results"] == []


def test_folder_without_results_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"results\.json"):
        write_page(tmp_path)


def test_files_have_the_numbers(tmp_path: Path, comparison: Comparison):
    (tmp_path / "results.json").write_text(results_json(replace(comparison, sections=SECTIONS[:1])))
    write_page(tmp_path)
    runs = list(csv.DictReader(io.StringIO((tmp_path / "runs.csv").read_text())))
    assert len(runs) == len(comparison.runs) * len(COLUMNS)
    summary = list(csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text())))
    assert len(summary) == len(ARMS) * 2 * len(COLUMNS)
    line = next(r for r in summary if (r["arm"], r["base"], r["split"]) == ("luffy", "poor", "ood"))
    own = [float(r["accuracy"]) for r in runs if (r["arm"], r["base"], r["split"]) == ("luffy", "poor", "ood")]
    assert float(line["mean"]) == pytest.approx(sum(own) / 4)
    assert line["reconstruction"] == "True" and line["significant"] == "True" and float(line["p_corrected"]) < 0.05
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["outcome"] and len(content["results"]) == len(summary)


@pytest.mark.parametrize("width", [40, 80, 160])
def test_terminal_shows_every_score_in_any_width(found: Statistics, width: int):
    console = Console(width=width, file=io.StringIO(), record=True)
    print_comparison(found, console, kinds={"methods"})
    text = console.export_text()
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    scores = [cell.text for table in tables(found, kind="methods") for row in table.rows for cell in row.cells]
    assert len(scores) > 30 and all(score in text for score in scores)


def test_terminal_prints_brackets_of_a_title_as_they_are(comparison: Comparison):
    arms = (replace(comparison.arms[0], title="[bold]RL[/x]"), *comparison.arms[1:])
    console = Console(width=120, file=io.StringIO(), record=True)
    print_comparison(statistics(replace(comparison, arms=arms), 100), console)
    assert "[bold]RL[/x]" in console.export_text()


def test_recipe_without_sections_gets_those_that_fit(comparison: Comparison):
    kinds = [section.kind for section in sections_of(comparison)]
    assert kinds == ["score-against-flops", "methods", "cost", "training", "dynamics", "tuning"]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"kind": "waterfal"}, "kinds are"),
        ({"kind": "methods", "colums": []}, "did you mean 'columns'"),
        ({"kind": "methods", "arms": ["lufy"]}, "did you mean 'luffy'"),
        ({"kind": "methods", "bases": ["rihc"]}, "did you mean 'rich'"),
        ({"kind": "methods", "columns": ["tset"]}, "columns are: test@0.6, ood@0.6"),
        ({"kind": "short", "pairs": []}, "pairs"),
        ({"kind": "cost", "paper": {"source": "s", "columns": ["a", "b"], "rows": {"r": [1]}}}, "1 values for 2"),
    ],
)
def test_section_that_makes_no_sense_is_refused_with_a_remedy(comparison: Comparison, section: dict, said: str):
    with pytest.raises(RecipeError, match=said.replace("'", ".")):
        shown_sections(statistics(replace(comparison, sections=(section,)), 50))


@given(st.lists(st.floats(0, 1), max_size=40))
def test_labels_keep_their_order_and_do_not_cover_each_other(heights):
    places = label_places(heights)
    order = sorted(range(len(heights)), key=heights.__getitem__)
    gap = min(1 / max(1, len(heights) - 1), 0.06)
    sorted_places = [places[index] for index in order]
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(sorted_places))
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)

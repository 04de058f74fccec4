"""The report of a comparison with many bases: means over blocks first, what is of one base folded away."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from tests.compare.comparisons import COLUMNS, make_comparison
from tests.pages.test_comparison import ARMS, EFFECTS, SECTIONS
from thence.compare.result import ALL_BASES, FEW_BASES, Comparison
from thence.compare.sections import Training, bases_of, read_section
from thence.compare.statistics import Statistics, statistics
from thence.names import bad_name
from thence.pages.comparison.figures import section_figures
from thence.pages.comparison.numbers import report_json, summary_csv
from thence.pages.comparison.outcome import outcome
from thence.pages.comparison.page import print_comparison, render_page, shown_sections
from thence.pages.comparison.tables import section_tables
from thence.pages.comparison.words import notes

BASES = tuple(f"base-{i}" for i in range(6))


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    made = make_comparison(EFFECTS, arms=ARMS, bases=BASES, seeds=1, problems=60, seed_sd=0.5)
    runs = tuple(run for run in made.runs if run.base != "base-5")  # only tuned on
    planned = {base: (0,) if base != "base-5" else () for base in BASES}
    return replace(made, runs=runs, sections=SECTIONS, base_seeds=planned)


@pytest.fixture(scope="module")
def found(comparison: Comparison) -> Statistics:
    return statistics(comparison, 200)


def test_means_and_paired_differences_are_over_blocks(comparison: Comparison, found: Statistics) -> None:
    own = [run.on(COLUMNS[0]).accuracy for run in comparison.runs if run.arm == "clean"]
    theirs = [run.on(COLUMNS[0]).accuracy for run in comparison.runs if run.arm == "long"]
    estimate = found.estimates["clean", ALL_BASES, COLUMNS[0]]
    assert estimate.seeds == 5 and estimate.mean == pytest.approx(np.mean(own))
    assert estimate.std == pytest.approx(np.std(own, ddof=1))
    difference = found.differences["clean", ALL_BASES, COLUMNS[0]]
    assert difference.seeds == 5 and difference.mean == pytest.approx(np.mean(own) - np.mean(theirs))


def test_runs_of_one_seed_from_two_bases_are_never_paired(comparison: Comparison) -> None:
    """Without the reference's run from a base, the other arm's run from that base has no partner."""
    less = replace(
        comparison, runs=tuple(r for r in comparison.runs if (r.arm, r.base) != ("long", "base-0")), pending=1
    )
    assert statistics(less, 50).differences["clean", ALL_BASES, COLUMNS[0]].seeds == 4


def test_few_bases_are_shown_one_by_one_as_ever(comparison: Comparison) -> None:
    few = replace(comparison, bases=BASES[:FEW_BASES], base_seeds={})
    assert not few.is_pooled and all(base != ALL_BASES for _, base, _ in statistics(few, 50).estimates)
    assert bases_of(read_section({"kind": "methods"}), few) == list(BASES[:FEW_BASES])
    assert bad_name(ALL_BASES)  # so that no base can be called so


def test_tables_show_the_mean_over_blocks_first_and_then_every_base(found: Statistics) -> None:
    tables = section_tables(read_section({"kind": "methods"}), found)
    assert [table.title for table in tables] == ["Mean over 5 blocks", *BASES[:5]]
    assert "over blocks" in tables[0].notes[0] and "over seeds" in tables[1].notes[0]
    assert [table.title for table in section_tables(read_section({"kind": "methods", "bases": ["base-2"]}), found)] == [
        "base-2"
    ]


def test_every_kind_of_section_has_its_mean_over_blocks(found: Statistics) -> None:
    for part in shown_sections(found):
        if part.kind != "tuning":
            assert [base.name for base in part.shown] == ["Mean over 5 blocks"]
            assert part.kind in ("score-against-flops", "training", "dynamics") or len(part.away) == 5
        else:
            assert len(part.shown) == 6 and not part.away  # folded base by base already


def test_a_figure_says_whose_curves_it_shows(found: Statistics) -> None:
    (drawn,) = section_figures(read_section({"kind": "dynamics"}), found)
    assert "Mean and range over 5 blocks" in drawn.notes[0]
    single = read_section({"kind": "training"})
    assert isinstance(single, Training)
    assert "From base-0, seed 0." in section_figures(single, found)[0].notes[0]


def test_the_page_folds_single_bases_away_and_has_no_switch(found: Statistics) -> None:
    page = render_page(found)
    assert 'class="switch"' not in page
    assert page.count('<details class="away">') == 6
    methods = page[page.index('<section class="methods">') :]
    before = methods[: methods.index('<details class="away">')]
    assert "Mean over 5 blocks" in before and "base-0" not in before
    assert "Base by base (5)" in methods


def test_outcome_notes_and_terminal_speak_of_blocks(found: Statistics) -> None:
    said = outcome(found)
    assert "(5 blocks, 60 problems" in said and "base-" not in said
    assert any("over 5 blocks" in note for note in notes(found))
    console = Console(record=True, width=100, file=io.StringIO())
    print_comparison(found, console)
    text = console.export_text()
    assert "Mean over 5 blocks" in text and not re.search(r"^base-\d", text, re.MULTILINE)


def test_what_is_unfinished_is_counted_in_blocks(comparison: Comparison) -> None:
    part = replace(comparison, runs=comparison.runs[:12], pending=33)
    table = section_tables(read_section({"kind": "methods"}), statistics(part, 50))[0]
    assert table.title == "Mean over the blocks so far, of 5"
    assert any(note.startswith("Blocks finished so far:") for note in table.notes)


def test_files_have_the_means_and_every_base(found: Statistics) -> None:
    rows = list(csv.DictReader(io.StringIO(summary_csv(found))))
    assert {row["base"] for row in rows} == {ALL_BASES, *BASES[:5]}
    assert {row["seeds"] for row in rows if row["base"] == ALL_BASES} == {"5"}
    assert json.loads(report_json(found))["base_seeds"]["base-5"] == []

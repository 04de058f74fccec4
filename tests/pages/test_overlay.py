"""Several runs on one page."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests.pages.made_pages import run_folder
from tests.pages.test_report import samples_of
from thence.cli import main
from thence.pages.overlay.page import named_runs, page_of, write_page
from thence.pages.overlay.tables import cost_of_all, results_of_all, settings_apart
from thence.toml import to_toml
from thence.train.run_marker import is_run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    folders = [run_folder(tmp_path / name, rl) for name, rl in (("one", 0.5), ("two", 0.7))]
    recipe = folders[1] / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("seed = 0", "seed = 5"))
    return folders


def test_results_stand_side_by_side_under_the_model(runs: list[Path]):
    table = results_of_all(named_runs(runs), whole=True)
    assert [(row.group, row.label, row.cells[0].text) for row in table.rows] == [
        ("base", "one", "10.0"),
        ("base", "two", "10.0"),
        ("after sft", "one", "40.0"),
        ("after sft", "two", "40.0"),
        ("after rl", "one", "50.0"),
        ("after rl", "two", "70.0"),
    ]
    assert table.rows[-1].cells[0].sub == "68.0 to 72.0\nn = 512 × 4"
    cost = cost_of_all(named_runs(runs))
    assert [(row.group, row.label, row.cells[1].text) for row in cost.rows] == [
        ("sft", "one", "50"),
        ("sft", "two", "50"),
        ("rl", "one", "100"),
        ("rl", "two", "100"),
    ]


def test_only_settings_that_differ_are_shown_and_a_missing_stage_once(runs: list[Path]):
    recipe = runs[0] / "recipe.toml"
    tables = tomllib.loads(recipe.read_text())
    tables["stages"].remove("eval-base")
    del tables["eval-base"]
    recipe.write_text(to_toml(tables))
    table = settings_apart(named_runs(runs))
    assert table.headers == ("Setting", "one", "two")
    shown = {row.label: [cell.text for cell in row.cells] for row in table.rows}
    assert shown["seed"] == ["0", "5"] and "eval-base" in shown["stages"][1] and "eval-base" not in shown["stages"][0]
    assert not any(label.startswith("eval-base") for label in shown)


def test_a_line_a_run_and_one_colour_a_run_in_every_chart(runs: list[Path]):
    text = write_page(runs, runs[0].parent / "both.html", "thence report one two").read_text()
    specs = [json.loads(one) for one in re.findall(r'class="spec">(.*?)</script>', text, re.DOTALL)]
    assert len(specs) == 4 + 7
    for spec in specs:
        assert {row["name"] for row in spec["data"]["values"]} == {"one", "two"}
        scale = spec["encoding"]["color"]["scale"]
        assert dict(zip(scale["domain"], scale["range"], strict=True)) == {
            "one": "var(--series-0)",
            "two": "var(--series-1)",
        }
    held = samples_of(text)
    assert len(held["samples"]) == 2 * 93 and len({row[0] for row in held["samples"]}) == 2 * 93
    assert "thence report one two" in text


def test_runs_of_one_name_are_told_apart(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    folders = [run_folder(tmp_path / place / "trial", 0.5) for place in ("a", "b")]
    assert list(named_runs(folders)) == ["a/trial", "b/trial"]
    assert page_of(folders) == tmp_path / "report-trial-trial.html"


def test_the_command_writes_the_page_and_says_where(
    runs: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert not any(is_run(folder) for folder in runs)  # a run that only looks like one can be read
    words = ["report", str(runs[0]), str(runs[1])]
    monkeypatch.setattr(sys, "argv", ["/somewhere/thence/__main__.py", *words])
    assert main(words) == 0
    page = runs[0].parent / "report-one-two.html"
    assert f"report: {page}" in capsys.readouterr().out
    assert f"python -m thence report {runs[0]} {runs[1]}" in page.read_text()
    assert main([*words, "--out", str(runs[0].parent / "there.html")]) == 0
    assert (runs[0].parent / "there.html").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["one", "one"], "these are one run"),
        (["one", "absent"], "no run at"),
        (["one", "two", "--out", "nowhere/page.html"], "there is no folder"),
        (["one", "--out", "page.html"], "keeps its page in its own folder"),
    ],
)
def test_mistakes_are_refused(
    runs: list[Path], words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(runs[0].parent)
    assert main(["report", *words]) != 0
    assert said in capsys.readouterr().err
    assert not list(runs[0].parent.glob("*.html"))

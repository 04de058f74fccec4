"""The tutorial and the pages of one's own data and one's own method, followed word for word."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import ROOT
from tests.repository.blocks import blocks_of
from tests.repository.following import follow

TUTORIAL, OWN_DATA, OWN_METHOD = (ROOT / "docs" / name for name in ("tutorial.md", "own-data.md", "own-method.md"))


@pytest.mark.everything
@pytest.mark.slow
def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    place, told = follow(TUTORIAL, tmp_path)
    assert place == tmp_path / "my-first-model"
    assert "report: runs/first-seed0/report.html" in told["thence run first.toml"]
    [longer] = [text for command, text in told.items() if "--rl.steps 12" in command]
    assert "sft 32/32" not in longer and "rl 12/12" in longer  # SFT is kept, RL goes on
    assert "B minus A on the same problems" in next(text for command, text in told.items() if "--compare" in command)
    assert (place / "runs/two/report.html").exists() and (place / "runs/first-seed0/report.html").exists()
    losses = next(text for command, text in told.items() if command.startswith("import json"))
    assert losses.startswith("[") and losses.count(",") == 3


@pytest.mark.slow
def test_the_data_of_the_page_are_checked_learned_and_tested(tmp_path: Path) -> None:
    place, told = follow(OWN_DATA, tmp_path)
    shown = next(block.text for block in blocks_of(OWN_DATA) if block.language == "text")
    assert told["python export.py\npython make_rows.py\nhead -n 2 train.jsonl"] == shown
    assert "all that was tried holds" in told["thence check world:chain/rich --data train.jsonl"]
    assert (place / "runs/sums-seed0/report.html").exists()
    [table] = [text for command, text in told.items() if "--dry-run" in command]
    before, after = (float(re.findall(rf"^{name} +([\d.]+)$", table, re.MULTILINE)[0]) for name in ("base", "sft"))
    assert before < 20 and after > 60
    rated = next(text for command, text in told.items() if "--pass-rates" in command)
    [counts] = re.findall(r"^500 rows: (\d+) never right, (\d+) always, (\d+) in between$", rated, re.MULTILINE)
    assert sum(map(int, counts)) == 500 and int(counts[2]) > 20
    assert (place / "rated.jsonl").read_text().count('"pass_rate": ') == 500


@pytest.mark.everything
@pytest.mark.slow
def test_the_method_of_the_page_is_installed_listed_and_compared(tmp_path: Path) -> None:
    place, told = follow(OWN_METHOD, tmp_path)
    assert "one importance ratio a response" in next(text for command, text in told.items() if "methods" in command)
    compared = next(text for command, text in told.items() if "thence compare" in command)
    assert "GRPO" in compared and "mine" in compared and "report: runs/own/report.html" in compared
    assert (place / "runs/own/report.html").exists()


@pytest.mark.parametrize("page", [TUTORIAL, OWN_DATA, OWN_METHOD], ids=lambda page: page.name)
def test_a_file_is_saved_before_it_is_used(page: Path) -> None:
    kinds = [(block.mark or block.language, block.said or block.text) for block in blocks_of(page)]
    saved = [said for kind, said in kinds if kind == "file"]
    assert len(saved) >= 2 and len(set(saved)) == len(saved)
    for name in saved:
        used = [place for place, (kind, said) in enumerate(kinds) if kind == "sh" and name in said]
        assert not used or kinds.index(("file", name)) < used[0]


def test_the_page_of_a_method_shows_the_package_of_the_examples() -> None:
    shown = {block.said: block.text for block in blocks_of(OWN_METHOD) if block.mark == "file"}
    package = {name: text for name, text in shown.items() if name.startswith("own_method/")}
    assert set(package) == {f"own_method/{file.name}" for file in (ROOT / "examples/own_method").iterdir()}
    for name, text in package.items():
        assert (ROOT / "examples" / name).read_text() == text, name

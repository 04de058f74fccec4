"""`thence.run`, `thence.load_run`, and what a run shows as tables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import thence
from tests.recipes import file_recipe
from thence.errors import UserError


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> thence.Run:
    return thence.run(file_recipe(tmp_path_factory.mktemp("recorded")), progress=False)


def test_the_tables_of_a_run_hold_what_its_files_hold(finished: thence.Run) -> None:
    assert finished.report == finished.folder / "report.html" and finished.report.is_file()
    assert list(finished.metrics["stage"]) == ["sft", "rl"] and list(finished.metrics["step"]) == [1, 1]
    assert finished.metrics["loss"].notna().all()
    samples = finished.samples
    assert len(samples[samples["stage"] == "eval"]) == 3 and len(samples[samples["stage"] == "rl"]) == 4
    assert samples["response"].map(type).eq(str).all()
    (row,) = finished.results.to_dict("records")
    assert row["subject"] == "rl" and row["problems"] == 3 and 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1


def test_a_run_is_opened_by_folder_and_by_name(finished: thence.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert thence.load_run(finished.folder) == thence.load_run(str(finished.folder)) == finished
    runs = finished.folder.parent / "runs"
    runs.mkdir()
    (runs / "mine").symlink_to(finished.folder)
    monkeypatch.chdir(finished.folder.parent)
    assert thence.load_run("mine").metrics.equals(finished.metrics)
    with pytest.raises(UserError, match="no run at nowhere"):
        thence.load_run("nowhere")


def test_the_page_is_written_where_it_is_missing(finished: thence.Run) -> None:
    finished.report.unlink()
    assert "<html" in finished.report.read_text()


@pytest.mark.parametrize("newer", ["metrics.jsonl", "stages/eval/result.json"])
def test_a_page_older_than_what_it_shows_is_written_again(newer: str, finished: thence.Run) -> None:
    page = finished.report
    page.write_text("as it was")
    assert finished.report.read_text() == "as it was"
    then = (finished.folder / newer).stat().st_mtime_ns - 1
    os.utime(page, ns=(then, then))
    assert "<html" in finished.report.read_text()


def test_tables_without_rows_have_their_columns(finished: thence.Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text((finished.folder / "recipe.toml").read_text())
    begun = thence.load_run(tmp_path)
    for full, empty in (
        (finished.metrics, begun.metrics),
        (finished.samples, begun.samples),
        (finished.results, begun.results),
    ):
        assert len(empty) == 0 < len(empty.columns) and set(empty.columns) <= set(full.columns)


def test_progress_is_shown_and_the_libraries_are_left_as_they_were(
    finished: thence.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging as theirs

    before = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    recipe = {**file_recipe(tmp_path), "stages": ["sft"]}
    del recipe["rl"], recipe["eval"]
    assert len(thence.run(recipe, {"sft.steps": 2}).metrics) == 2
    assert "sft: 2 steps" in capsys.readouterr().out
    assert (theirs.get_verbosity(), theirs.is_progress_bar_enabled()) == before


def test_without_pandas_the_error_says_what_to_install(finished: thence.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match=r'pip install "thence\[pandas\]"'):
        _ = finished.metrics


def test_the_public_names_are_listed_and_all_of_them_are_there() -> None:
    assert dir(thence) == sorted(thence.__all__)
    assert {"Run", "run", "load_run", "audit"} <= set(dir(thence))
    for name in dir(thence):
        assert getattr(thence, name) is not None
    code = "import sys, thence; dir(thence); assert 'torch' not in sys.modules; print(thence.audit.check.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "check", done.stderr

"""`thence data`: rows as the model sees them, what is trained, and how long they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipes import write_rows
from thence.cli import main
from thence.cli.data import histogram

MODEL = ["--model", "world:chain/rich"]


def test_rows_are_printed_with_what_is_trained_and_how_long_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "1+2?", "completion": "3#3", "answer": "3"}, {"prompt": "12+3?", "answer": "15"}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    assert main(["data", file, *MODEL]) == 0
    shown = capsys.readouterr().out
    assert "$1+2?»3#3$«" in shown and "row 1: 5 + 4 trained tokens, answer 3" in shown
    assert "row 2: 6 tokens, answer 15" in shown
    assert "2 rows, 1 with a demonstration; 15 tokens, 4 trained" in shown
    assert "50% up to 6" in shown


def test_a_recipe_and_its_fields_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "quickstart", "--n", "1", "--sft.data.limit", "7"]) == 0
    shown = capsys.readouterr().out
    assert "7 rows" in shown and shown.count("row ") == 1


def test_without_a_model_files_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "rows.jsonl"]) == 2
    assert "thence data rows.jsonl --model MODEL" in capsys.readouterr().err


def test_a_histogram_counts_every_length_once() -> None:
    lines = histogram([1, 1, 2, 50, 100])
    *bars, quantiles = lines
    assert len(bars) <= 12 and sum(int(line.rpartition(" ")[2]) for line in bars) == 5
    assert quantiles == "50% up to 2, 95% up to 100, 99% up to 100, longest 100"
    assert histogram([7])[0].split() == ["7", "#" * 40, "1"]
    assert all(len(line) <= 79 for line in histogram([1, 10**6])[:-1])

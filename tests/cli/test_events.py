"""`--json` and `--quiet`: what a program reads is whole, and what nobody asked for is not printed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.recipes import model_table, write_reward
from thence.cli import main
from thence.cli.events import tell
from thence.toml import to_toml


def events(said: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in said.splitlines()]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}+{i}?", "completion": f"{2 * i}", "answer": str(2 * i)} for i in range(4)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = {
        "name": "told",
        "stages": ["sft", "eval"],
        "model": model_table(tmp_path),
        "data": {"source": ["rows.jsonl"]},
        "sft": {"batch": 2, "epochs": 1, "lr": 1e-3},
        "eval": {"max_tokens": 4, "reward": write_reward(tmp_path, "1.0"), "data": {"source": ["rows.jsonl"]}},
    }
    Path("told.toml").write_text(to_toml(tables))
    return "told.toml"


def test_a_run_tells_a_program_its_steps_and_results(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", recipe, "--json"]) == 0
    found = events(capsys.readouterr().out)
    kinds = [event["event"] for event in found]
    assert kinds[0] == "doing" and kinds[-1] == "done" and {"begin", "stage", "step"} <= set(kinds)
    steps = [event for event in found if event["event"] == "step" and event["stage"] == "sft"]
    assert [step["step"] for step in steps] == [1, 2] and all(math.isfinite(step["loss"]) for step in steps)
    done = found[-1]
    assert Path(done["folder"]).is_dir() and Path(done["report"]).is_file()
    assert done["results"][0]["accuracy"] == 1.0 and done["results"][0]["stage"] == "eval"


def test_a_quiet_run_prints_nothing_and_is_done(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", recipe, "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert Path("runs/told-seed0/report.html").is_file()


def test_an_evaluation_tells_a_program_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["eval", "world:chain/rich", "--suite", "embedded", "--tasks", "chain-test", "--limit", "2"]
    assert main([*command, "--json"]) == 0
    found = events(capsys.readouterr().out)
    assert [event["event"] for event in found][:2] == ["begin", "task"]
    assert "chain-test" in found[-1]["results"]["results"]
    assert main([*command, "--folder", "again", "--quiet"]) == 0
    assert capsys.readouterr().out == "" and Path("again/results.json").is_file()


@pytest.mark.parametrize(
    "given",
    [
        ["run", "quickstart", "--quiet", "--json"],
        ["compare", "quick", "--quiet", "--json"],
        ["eval", "--list", "--json"],
        ["eval", "--compare", "a", "b", "--quiet"],
    ],
    ids=" ".join,
)
def test_flags_that_do_not_go_together_are_refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given) == 2
    assert "--quiet" in (said := capsys.readouterr().err) or "--json" in said


def test_what_is_no_json_number_is_null_and_secrets_are_hidden(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tell("step", loss=math.nan, deep={"norm": [math.inf, 1.0]})
    assert events(capsys.readouterr().out) == [{"event": "step", "loss": None, "deep": {"norm": [None, 1.0]}}]
    tell("log", text="GET https://u:pa55word@host/x")
    assert "pa55word" not in capsys.readouterr().out

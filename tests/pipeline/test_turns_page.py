"""The how-to for rollouts of several turns runs as it stands, and says what the calculator says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from thence.cli import main
from thence.data.worlds.calculator import Calculator
from thence.jsonl import read_jsonl

PAGE = Path(__file__).parents[2] / "docs" / "turns.md"


def test_the_files_of_the_page_train_and_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = dict(re.findall(r"<!-- file: ([a-z.]+) -->\n```[a-z]+\n(.*?)```", PAGE.read_text(), re.DOTALL))
    assert set(blocks) == {"shop.py", "tasks.jsonl", "recipe.toml"}
    for name, text in blocks.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    assert main(["run", "recipe.toml"]) == 0
    lines = [line for line in read_jsonl(Path("runs/shop-seed0/metrics.jsonl")) if line["stage"] == "rl"]
    named = ("turns", "observation_tokens", "turn_limit", "context_limit", "environment_errors", "environment_timeouts")
    assert all(f"`{name}`" in PAGE.read_text() and all(name in line for line in lines) for name in named)
    assert len(lines) == 3 and lines[0]["turns"] > 1
    capsys.readouterr()
    assert main(["sample", "runs/shop-seed0", "--stage", "rl"]) == 0
    assert "observed" in capsys.readouterr().out


def test_the_calculator_does_what_the_page_shows() -> None:
    own = Calculator()
    own.reset({"prompt": "47a+8b-3c*6?", "answer": "12"})
    assert own.step("47a+8=55b-3=52c*6") == ("=12", None, False)
    assert own.step("d*9") == ("=08", None, False), "the value before is that of the last call"
    assert own.step("#12") == (None, 1.0, True) and own.step("#13") == (None, 0.0, True)


@pytest.mark.parametrize("turn", ["", "47a+8", "d*4", "#1", "47a*1", "c*6=12"])
def test_a_turn_that_is_no_call_and_no_answer_ends_the_rollout_without_a_reward(turn: str) -> None:
    own = Calculator()
    own.reset({"prompt": "47a+8b-3c*6?", "answer": "12"})
    assert own.step(turn) == (None, 0.0, True)

"""The how-to for own rewards runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from thence.cli import main
from thence.jsonl import read_jsonl

PAGE = Path(__file__).parents[2] / "docs" / "own-reward.md"


def test_the_files_of_the_page_train_with_every_reward_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = dict(re.findall(r"```(json|python|toml)\n(.*?)```", PAGE.read_text(), re.DOTALL))
    for name, kind in (("tasks.jsonl", "json"), ("rewards.py", "python"), ("recipe.toml", "toml")):
        (tmp_path / name).write_text(blocks[kind])
    monkeypatch.chdir(tmp_path)
    assert main(["run", "recipe.toml"]) == 0
    lines = list(read_jsonl(Path("runs/own-reward-seed0/metrics.jsonl")))
    named = set(re.findall(r"`(reward/[a-z_/]+)`", PAGE.read_text()))
    assert len(lines) == 3 and len(named) == 5 and all(named <= line.keys() for line in lines)
    assert main(["sample", "runs/own-reward-seed0", "--stage", "rl"]) == 0

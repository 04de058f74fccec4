"""Relative paths of a recipe's file start beside it; those of flags and of a run's own recipe at the current folder."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from thence.errors import UserError
from thence.pipeline.preflight import preflight
from thence.recipe import load_recipe

RECIPE = """
stages = ["rl", "eval"]
[model]
path = "base"
[data]
source = ["train.jsonl", "owner/name"]
template = "chat.jinja"
columns = { prompt = "train.jsonl" }
[rl]
reward = "own.py:score"
data = { source = ["more/rl.jsonl"] }
[eval.splits.hard]
source = ["../hard.jsonl"]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe and its files, seen from the folder above."""
    folder = tmp_path / "mine"
    (folder / "more").mkdir(parents=True)
    (folder / "base").mkdir()
    for name in ("train.jsonl", "chat.jinja", "own.py", "more/rl.jsonl", "../hard.jsonl"):
        (folder / name).write_text("")
    (folder / "recipe.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return folder


def test_every_path_starts_beside_the_recipe(place: Path) -> None:
    recipe = load_recipe("mine/recipe.toml")
    assert recipe.model.path == "mine/base"
    assert recipe.data.source == ["mine/train.jsonl", "owner/name"] and recipe.data.template == "mine/chat.jinja"
    assert recipe.data.columns == {"prompt": "train.jsonl"}
    rl, evaluation = recipe.stage("rl"), recipe.stage("eval")
    assert rl.reward == "mine/own.py:score" and rl.data["source"] == ["mine/more/rl.jsonl"]  # type: ignore[union-attr]
    assert evaluation.splits["hard"]["source"] == ["mine/../hard.jsonl"]  # type: ignore[union-attr]


def test_from_its_own_folder_nothing_changes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for name in ("recipe.toml", "./recipe.toml", str(place / "recipe.toml")):
        assert load_recipe(name).data.source == ["train.jsonl", "owner/name"]


def test_a_flag_starts_at_the_current_folder(place: Path) -> None:
    assert load_recipe("mine/recipe.toml", {"data.source": ["train.jsonl"]}).data.source == ["train.jsonl"]


def test_a_file_of_the_current_folder_is_taken_where_none_lies_beside_the_recipe_and_that_is_said(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (place / "train.jsonl").rename(place.parent / "train.jsonl")
    with caplog.at_level(logging.WARNING):
        assert load_recipe("mine/recipe.toml").data.source[0] == "train.jsonl"
    assert "train.jsonl is not beside the recipe (mine): the one in the current folder is taken" in caplog.text


def test_a_file_that_is_nowhere_is_named_where_it_was_looked_for(place: Path) -> None:
    (place / "more" / "rl.jsonl").unlink()
    recipe = load_recipe("mine/recipe.toml", {"model.path": "world:chain/rich"})
    refused = [finding for finding in preflight(recipe) if finding.state == "refused"]
    assert any("mine/more/rl.jsonl" in finding.reason for finding in refused), refused


def test_the_recipe_that_a_run_keeps_is_read_as_it_stands(place: Path) -> None:
    (place / ".thence-run.json").write_text("{}")
    assert load_recipe("mine/recipe.toml").data.source[0] == "train.jsonl"


def test_a_name_of_a_run_beside_the_recipe_keeps_its_stage_and_step(place: Path) -> None:
    (place / "runs" / "a").mkdir(parents=True)
    for name, expected in (("runs/a:rl@40", "mine/runs/a:rl@40"), ("runs/a@40", "mine/runs/a@40")):
        text = RECIPE.replace('path = "base"', f'path = "{name}"')
        (place / "recipe.toml").write_text(text)
        assert load_recipe("mine/recipe.toml").model.path == expected


def test_a_recipe_with_a_text_where_a_path_stands_is_refused_and_not_a_crash(place: Path) -> None:
    (place / "recipe.toml").write_text(RECIPE.replace('"base"', '"' + "x" * 5000 + '"'))
    with pytest.raises(UserError, match="longer than any path"):
        load_recipe("mine/recipe.toml")

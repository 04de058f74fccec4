"""Rewards in parts in a run: logged, kept with samples, drawn on the page; columns of the row in RL and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.recipes import ROWS, Tables, changed, file_recipe, write_rows
from thence.errors import UserError
from thence.jsonl import read_jsonl
from thence.pages.run.page import shown_samples, write_page
from thence.pipeline.run import run


@pytest.fixture
def recipe(tmp_path: Path) -> Tables:
    """RL and an evaluation on rows with a column of their own."""
    tables = changed(file_recipe(tmp_path), {"stages": ["rl", "eval"]})
    for name, rows in (("train.jsonl", ROWS), ("test.jsonl", ROWS[:3])):
        write_rows(tmp_path / name, [{**row, "level": 2 + i} for i, row in enumerate(rows)])
    return tables


def own(folder: Path, **functions: str) -> None:
    lines = [
        f"def {name}(prompt, response, answer, columns):\n    return {value}\n" for name, value in functions.items()
    ]
    (folder / "own.py").write_text("\n".join(lines))


def lines(folder: Path, stage: str) -> list[dict[str, Any]]:
    return list(read_jsonl(folder / "stages" / stage / "samples.jsonl"))


def test_components_are_logged_kept_with_samples_and_drawn(recipe: Tables, tmp_path: Path) -> None:
    own(tmp_path, share="{'length': len(response) / 8, 'level': columns['level']}")
    folder = run(recipe)
    (line,) = read_jsonl(folder / "metrics.jsonl")
    samples = lines(folder, "rl")
    means = {k: sum(s["components"][k] for s in samples) / len(samples) for k in ("length", "level")}
    assert {key: line[f"reward/{key}"] for key in means} == pytest.approx(means)
    assert line["reward"] == pytest.approx(sum(means.values()))
    assert all(s["score"] == pytest.approx(sum(s["components"].values())) for s in samples)
    assert all(s["components"]["level"] == 2 + s["index"] for s in samples)
    page = write_page(folder).read_text()
    assert "Reward: length" in page and "Reward: level" in page


def test_a_reward_that_is_not_used_beside_others_is_named(
    recipe: Tables, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own(tmp_path, share="1.0")
    run(changed(recipe, {"rl.rewards": {"exact": 1.0}}))
    assert "is not used, since rewards is set" in caplog.text and recipe["rl"]["reward"] in caplog.text


def test_several_rewards_with_weights(recipe: Tables, tmp_path: Path) -> None:
    own(tmp_path, share="len(response) / 8", level="columns['level']")
    reward = recipe["rl"].pop("reward")
    rewards = {"exact": 1.0, reward: 0.5, reward.replace(":share", ":level"): 0.25}
    folder = run(changed(recipe, {"rl.rewards": rewards}))
    for sample in lines(folder, "rl"):
        exact, length, level = (sample["components"][name] for name in ("exact", "share", "level"))
        assert sample["score"] == pytest.approx(exact + 0.5 * length + 0.25 * level) and level == 2 + sample["index"]
        assert sample["verdict"] == ("right" if exact else "wrong")


def test_an_evaluation_stage_hands_the_columns_over(recipe: Tables, tmp_path: Path) -> None:
    own(tmp_path, share="columns['level']")
    folder = run(changed(recipe, {"eval.reward": recipe["rl"]["reward"]}))
    assert [sample["score"] for sample in lines(folder, "eval")] == [2, 3, 4]
    (row,) = json.loads((folder / "stages" / "eval" / "result.json").read_text())["rows"]
    assert row["reward"] == 3


def test_an_evaluation_stage_keeps_the_components_and_its_page_shows_them(recipe: Tables, tmp_path: Path) -> None:
    own(tmp_path, share="{'length': len(response) / 8, 'level': columns['level']}")
    folder = run(changed(recipe, {"eval.reward": recipe["rl"]["reward"]}))
    found = lines(folder, "eval")
    assert [sample["components"]["level"] for sample in found] == [2, 3, 4]
    assert all(s["score"] == pytest.approx(sum(s["components"].values())) for s in found)
    shown = [make().components for make in shown_samples(folder, "eval")]
    assert shown == [sample["components"] for sample in found]


def test_one_of_several_rewards_that_cannot_be_loaded_is_refused_before_the_first_step(recipe: Tables) -> None:
    del recipe["rl"]["reward"]
    with pytest.raises(UserError, match=r"there is no file absent\.py"):
        run(changed(recipe, {"rl.rewards": {"exact": 1.0, "absent.py:own": 1.0}}))
    assert not (Path(recipe["folder"]) / "stages").exists()


def test_rewards_take_the_place_of_a_reward_and_the_run_can_be_resumed(recipe: Tables, tmp_path: Path) -> None:
    (tmp_path / "own.py").unlink()
    given = changed(recipe, {"rl.rewards": {"exact": 2.0}})
    folder = run(given)
    assert all(sample["components"].keys() == {"exact"} for sample in lines(folder, "rl"))
    assert run(given) == folder
    with pytest.raises(UserError, match=r"rl\.rewards was"):
        run(changed(given, {"rl.rewards": {"exact": 1.0}}))

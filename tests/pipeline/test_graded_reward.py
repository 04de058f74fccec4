"""A score that is a degree is not a right answer: without a threshold there is a mean reward and no accuracy."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.recipes import model_table
from thence.cli import main
from thence.compare.summary import summarise as summarise_run
from thence.errors import RecipeError, UserError
from thence.evaluate.metrics import mean_reward_of
from thence.pages.run.page import write_page
from thence.pages.run.tables import results_table
from thence.pages.terminal import with_notes
from thence.pipeline.preflight import gives_degrees, preflight
from thence.pipeline.run import run
from thence.pipeline.run_files import read_run
from thence.recipe import load_recipe

HEAD = "def reward(prompt, response, answer):\n"


def tables(folder: Path, body: str, after: str = "", **changes: dict[str, Any]) -> dict[str, Any]:
    """A recipe of a tiny random model whose evaluation, and RL, are graded by an own function."""
    (folder / "own.py").write_text(f"{HEAD}    {body}\n{after}\n")
    reward = f"{folder / 'own.py'}:reward"
    own: dict[str, Any] = {
        "folder": str(folder / "run"),
        "stages": ["eval"],
        "model": model_table(folder),
        "data": {"source": ["world:chain"], "limit": 4},
        "eval": {"max_tokens": 4, "samples": 2, "reward": reward},
        "rl": {"max_tokens": 4, "steps": 1, "prompts": 2, "rollouts": 2, "reward": reward},
    }
    return {key: {**value, **changes.get(key, {})} if isinstance(value, dict) else value for key, value in own.items()}


def row_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "stages" / "eval" / "result.json").read_text())["rows"][0]


def printed(folder: Path) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(with_notes(results_table(read_run(folder))))
    return capture.get()


def test_a_reward_that_is_always_a_tenth_is_not_an_accuracy_of_100(tmp_path: Path) -> None:
    folder = run(tables(tmp_path, "return 0.1"))
    row = row_of(folder)
    assert (row["accuracy"], row["low"], row["high"]) == (None, None, None)
    assert (row["right"], row["wrong"], row["unknown"], row["graded"]) == (0, 0, 0, 8)
    assert row["reward"] == pytest.approx(0.1)
    table = printed(folder)
    assert "Mean reward" in table and "0.100" in table and "Accuracy" not in table and "100.0" not in table
    assert "states no score from which a response is right" in " ".join(table.split())
    page = write_page(folder).read_text()
    assert '<th scope="col">Mean reward</th>' in page and "Accuracy" not in page
    assert "the mean reward of base is 0.100" in page and "graded 0.1" in page
    result = json.loads((folder / "report.json").read_text())["results"][0]
    assert (result["accuracy"], result["reward"], result["graded"]) == (None, pytest.approx(0.1), 8)
    (line,) = csv.DictReader((folder / "report.csv").read_text().splitlines())
    assert (line["accuracy"], line["graded"]) == ("", "8") and float(line["reward"]) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("after", "field"), [("reward.right_from = 0.1", None), ("", 0.1), ("reward.right_from = 0.2", 0.1)]
)
def test_with_a_threshold_there_is_an_accuracy(after: str, field: float | None, tmp_path: Path) -> None:
    changes = {} if field is None else {"reward_right_from": field}
    folder = run(tables(tmp_path, "return 0.1", after, eval=changes))
    row = row_of(folder)
    assert (row["accuracy"], row["right"], row["graded"]) == (1.0, 8, 0)
    assert row["reward"] == pytest.approx(0.1)
    assert "Accuracy, %" in printed(folder) and "100.0" in printed(folder)


def test_the_threshold_of_the_recipe_is_kept_for_grading_again(tmp_path: Path) -> None:
    folder = run(tables(tmp_path, "return 0.1", eval={"reward_right_from": 0.1}))
    kept = folder / "stages" / "eval" / "evaluation"
    assert main(["eval", "--regrade", str(kept)]) == 0
    (row,) = csv.DictReader((kept / "results.csv").read_text().splitlines())
    assert (row["right"], row["graded"]) == ("8", "0")


def test_a_run_and_its_stages_are_compared_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = "return float(len(response) % 2)"
    folder = run({**tables(tmp_path, body, sft={"steps": 1}), "stages": ["eval-base", "sft", "eval-sft", "eval"]})
    assert main(["eval", "--compare", f"{folder}:eval-base", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "A: base" in said and "B: sft" in said
    assert main(["eval", "--compare", f"{folder}:eval-base", f"{folder}:sft"]) == 2
    said = capsys.readouterr().err
    assert "'sft' of this run has no evaluation" in said
    assert f"{folder}:eval-base, {folder}:eval-sft, {folder}:eval" in said
    assert main(["eval", "--regrade", str(folder)]) == 0


def test_an_evaluation_that_kept_no_threshold_is_resumed_and_graded_with_it(tmp_path: Path) -> None:
    recipe = tables(tmp_path, "return 0.1", eval={"reward_right_from": 0.1})
    folder = run(recipe)
    stage = folder / "stages" / "eval"
    settings = stage / "evaluation" / "evaluation.toml"
    settings.write_text(re.sub(r"right_from = .*\n", "", settings.read_text()))
    (stage / "done.json").unlink()
    run(recipe)
    assert row_of(folder)["right"] == 8
    assert "right_from = 0.1" in settings.read_text()


@pytest.mark.parametrize("value", ["answer is None", "float(answer is None)"])
def test_a_function_that_says_yes_or_no_has_an_accuracy_without_a_threshold(value: str, tmp_path: Path) -> None:
    row = row_of(run(tables(tmp_path, f"return {value}")))
    assert (row["accuracy"], row["wrong"], row["graded"], row["reward"]) == (0.0, 8, 0, 0.0)


def test_a_single_degree_takes_the_accuracy_away_and_unknown_is_in_no_mean(tmp_path: Path) -> None:
    calls = "calls.append(0) or [2.5, 1.0, None, 0.0, None, None, 1.0, 0.0][len(calls) - 1]"
    row = row_of(run(tables(tmp_path, f"return {calls}", "calls = []")))
    assert row["accuracy"] is None
    assert (row["right"], row["wrong"], row["graded"], row["unknown"]) == (2, 2, 1, 3)
    assert row["reward"] == pytest.approx((1.75 + 0 + 0.5) / 3)  # one problem has no reward at all
    assert row["reward_low"] < row["reward"] < row["reward_high"]


def test_rl_logs_no_accuracy_of_degrees(tmp_path: Path) -> None:
    for name, body, accuracy in (("degrees", "return len(response) / 9 + 0.01", None), ("right", "return 1.0", 1.0)):
        (tmp_path / name).mkdir()
        folder = run({**tables(tmp_path / name, body), "stages": ["rl"]})
        (line,) = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
        assert line["accuracy"] == accuracy and line["reward"] > 0


def test_a_dry_run_says_that_there_will_be_no_accuracy(tmp_path: Path) -> None:
    found = {f.part: f for f in preflight(load_recipe(tables(tmp_path, "return 0.1")), tmp_path / "run")}
    (reward,) = (finding for part, finding in found.items() if "reward" in part)
    assert gives_degrees(reward) and "reward_right_from" in reward.reason


def test_a_function_that_hangs_is_refused_before_the_first_step(tmp_path: Path) -> None:
    recipe = tables(tmp_path, "\n    while True: pass", eval={"reward_seconds": 0.4})
    with pytest.raises(UserError, match=r"took more than 0.4 s on response 1[\s\S]*reward_seconds"):
        run(recipe)
    assert not (tmp_path / "run" / "stages").exists()


def test_a_threshold_for_a_grader_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="says by itself which responses are right"):
        run(tables(tmp_path, "return 1", eval={"reward": "exact", "reward_right_from": 0.5}))
    for value in ("nan", "inf", "high"):
        with pytest.raises(RecipeError, match="reward_right_from"):
            load_recipe(tables(tmp_path, "return 1"), {"eval.reward_right_from": value})


def test_exgrpo_asks_for_a_threshold(tmp_path: Path) -> None:
    recipe = {**tables(tmp_path, "return 0.1", rl={"method": "exgrpo"}), "stages": ["rl"]}
    with pytest.raises(UserError, match=r"exgrpo replays right responses[\s\S]*reward_right_from"):
        run(recipe)


def test_a_comparison_makes_no_accuracy_of_degrees(tmp_path: Path) -> None:
    folder = run(tables(tmp_path, "return 0.1"))
    with pytest.raises(UserError, match=r"gives degrees and states no threshold[\s\S]*reward_right_from"):
        summarise_run(folder)
    assert not (folder / "summary.json").exists()


def test_results_of_an_earlier_version_are_read_as_they_were(tmp_path: Path) -> None:
    folder = run(tables(tmp_path, "return 1.0"))
    path = folder / "stages" / "eval" / "result.json"
    result = json.loads(path.read_text())
    result["rows"] = [
        {key: value for key, value in row.items() if "reward" not in key and key != "graded"} for row in result["rows"]
    ]
    path.write_text(json.dumps(result))
    (cell,) = read_run(folder).cells
    assert (cell.accuracy, cell.reward, cell.graded) == (1.0, None, None)
    assert "100.0" in printed(folder) and "Accuracy" in write_page(folder).read_text()


def test_samples_show_the_degree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tables(tmp_path, "return 0.25"))
    assert main(["sample", str(folder), "--verdict", "graded", "--n", "1"]) == 0
    assert "graded 0.25" in capsys.readouterr().out


def test_a_mean_reward_may_have_any_scale() -> None:
    score = mean_reward_of([[-200.0], [100.0, 100.0], [400.0], []], 2)
    assert (score.value, score.problems) == (100, 3)
    assert score.low < -200 and score.high > 400  # Student's t of two degrees of freedom: wide
    only = mean_reward_of([[3.0]], 1)
    assert (only.value, only.low, only.high) == (3.0, -math.inf, math.inf)


def test_an_exit_in_code_that_is_not_ours_does_not_count_as_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import thence.methods.registry as registry

    (tmp_path / "their_method.py").write_text("import sys\ndef load():\n    sys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    import their_method  # type: ignore[import-not-found]

    entry = type("Entry", (), {"name": "theirs", "load": staticmethod(their_method.load)})
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    assert main(["methods"]) == 1
    said = capsys.readouterr().err
    assert "their_method.py:3 called sys.exit(0)" in said
    assert main(["eval", "--help"]) == 0
    sys.modules.pop("their_method")

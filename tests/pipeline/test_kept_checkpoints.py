"""Checkpoints that stay (`keep_every`), and their names: RUN@STEP and RUN:STAGE@STEP."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import equal

from tests.recipes import Tables, changed, file_recipe
from thence.cli import main
from thence.errors import UserError
from thence.evaluate.origin import find_model
from thence.jsonl import read_jsonl
from thence.pipeline import sft_stage
from thence.pipeline.run import run
from thence.train.run_models import find_trained

SFT = {"sft.steps": 6, "sft.schedule": "constant", "sft.warmup": 0.0, "sft.checkpoint_every": 4}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    at = tmp_path_factory.mktemp("kept")
    return changed(file_recipe(at), {"stages": ["sft", "rl"], "rl.steps": 4, **SFT})


@pytest.fixture(scope="module")
def keeping(recipe: Tables) -> Path:
    """A run that keeps the checkpoints of every second step."""
    return run(changed(recipe, {"sft.keep_every": 2, "rl.keep_every": 2}))


def steps(folder: Path, stage: str) -> list[str]:
    return sorted(path.name for path in (folder / "stages" / stage / "checkpoints").glob("step-*"))


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The metrics without times."""
    return [
        {name: value for name, value in line.items() if "second" not in name and not name.endswith("_s")}
        for line in read_jsonl(folder / "metrics.jsonl")
    ]


def test_they_stay_after_the_stage_and_training_is_the_same(recipe: Tables, keeping: Path, tmp_path: Path) -> None:
    plain = run(changed(recipe, {"folder": str(tmp_path / "plain")}))
    assert steps(plain, "sft") == [] and steps(plain, "rl") == ["step-000004"]
    assert steps(keeping, "sft") == ["step-000002", "step-000004", "step-000006"]
    assert steps(keeping, "rl") == ["step-000002", "step-000004"]
    assert numbers(keeping) == numbers(plain)
    for stage in ("sft", "rl"):
        weights = [load_file(folder / "stages" / stage / "model" / "model.safetensors") for folder in (keeping, plain)]
        assert all(equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_exported_one_is_the_model_of_a_run_that_ends_there(recipe: Tables, keeping: Path, tmp_path: Path) -> None:
    short = run(changed(recipe, {"folder": str(tmp_path / "short"), "stages": ["sft"], "sft.steps": 2}))
    assert main(["export", f"{keeping}:sft@2", str(tmp_path / "exported")]) == 0
    made, expected = load_file(tmp_path / "exported" / "model.safetensors"), short / "stages" / "sft" / "model"
    weights = load_file(expected / "model.safetensors")
    assert made.keys() == weights.keys() and all(equal(made[name], weights[name]) for name in made)


def test_a_resumed_run_that_does_not_ask_for_them_removes_none(
    recipe: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = changed(recipe, {"folder": str(tmp_path / "run"), "stages": ["sft"]})
    draw = sft_stage.batch_at

    def stopped(n: int, batch: int, seed: int, step: int) -> list[int]:
        if step == 3:
            raise KeyboardInterrupt
        return list(draw(n, batch, seed, step))

    with monkeypatch.context() as patched:
        patched.setattr(sft_stage, "batch_at", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(changed(again, {"sft.keep_every": 2}))
    assert steps(run(again), "sft") == ["step-000002", "step-000006"]


def test_without_a_stage_the_step_must_be_of_one_alone(keeping: Path) -> None:
    assert find_trained(f"{keeping}@6").words == "the checkpoint after step 6 of stage sft"
    with pytest.raises(UserError, match="several stages") as refused:
        find_trained(f"{keeping}@4")
    assert f"{keeping}:sft@4" in str(refused.value) and f"{keeping}:rl@4" in str(refused.value)


def test_a_step_that_did_not_stay_is_refused_with_those_that_did(keeping: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint after step 3 of stage sft") as refused:
        find_trained(f"{keeping}:sft@3")
    assert f"{keeping}:sft@2" in str(refused.value)
    with pytest.raises(UserError, match="no training stage 'eval'"):
        find_trained(f"{keeping}:eval@2")


def test_a_name_that_is_a_folder_too_is_refused(keeping: Path, tmp_path: Path) -> None:
    shutil.copytree(keeping, tmp_path / "mine")
    assert find_trained(f"{tmp_path / 'mine'}@6").folder.name == "step-000006"
    (tmp_path / "mine@6").mkdir()
    with pytest.raises(UserError, match="is a folder, and could also be step 6"):
        find_trained(f"{tmp_path / 'mine'}@6")


def test_every_command_takes_one_where_it_takes_a_model(
    keeping: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written beside the checkpoints once, and is the model of a run that ends there."""
    model, stage = find_model(f"{keeping}:sft@2")
    assert stage == "sft" and find_model(f"{keeping}:sft@2")[0] == model
    made, checkpoint = load_file(f"{model.path}/model.safetensors"), keeping / "stages/sft/checkpoints/step-000002"
    weights = load_file(checkpoint / "model.safetensors")
    assert made.keys() == weights.keys() and all(equal(made[name], weights[name]) for name in made)
    monkeypatch.chdir(tmp_path)
    assert main(["check", f"{keeping}:sft@2"]) == 0
    assert main(["eval", f"{keeping}:rl@2", "--suite", "embedded", "--limit", "2", "--set", "max_tokens=4"]) == 0
    assert main(["sample", f"{keeping}:sft@2", "--prompt", "1+1?", "--n", "2", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out.count("response  ") == 2
    assert [path.name[:11] for path in (keeping / "stages/rl/exported").glob("step-*")] == ["step-000002"]


def test_a_recipe_starts_from_one(keeping: Path, recipe: Tables, tmp_path: Path) -> None:
    base = {"folder": str(tmp_path / "next"), "stages": ["sft"], "sft.steps": 1, "sft.lr": 1e-30}
    tables = changed(recipe, base)
    tables["model"] = {"path": f"{keeping}:sft@2"}
    tables["sft"]["weight_decay"] = 0.0
    started = load_file(run(tables) / "stages" / "sft" / "model" / "model.safetensors")
    expected = load_file(keeping / "stages/sft/checkpoints/step-000002/model.safetensors")
    assert all(equal(started[name], expected[name]) for name in expected)
    for name, stage in ((f"{keeping}:sft", "sft"), (str(keeping), "rl")):
        tables["model"], tables["folder"] = {"path": name}, str(tmp_path / stage)
        started = load_file(run(tables) / "stages" / "sft" / "model" / "model.safetensors")
        expected = load_file(keeping / "stages" / stage / "model" / "model.safetensors")
        assert all(equal(started[tensor], expected[tensor]) for tensor in expected)


def test_a_recipe_that_names_no_model_of_the_run_is_refused_with_those_that_there_are(
    keeping: Path, recipe: Tables, tmp_path: Path
) -> None:
    tables = changed(recipe, {"folder": str(tmp_path / "next"), "stages": ["sft"]})
    for name, says in ((f"{keeping}:sft@3", "no checkpoint after step 3"), (f"{keeping}:eval", "'eval' of this run")):
        tables["model"] = {"path": name}
        with pytest.raises(UserError, match=says) as refused:
            run(tables)
        assert f"{keeping}:sft@2" in refused.value.remedy and refused.value.field == "model.path"
        assert not (tmp_path / "next").exists()


def test_a_step_that_was_trained_anew_is_another_model(keeping: Path, tmp_path: Path) -> None:
    shutil.copytree(keeping, tmp_path / "run")
    first = find_model(f"{tmp_path / 'run'}:sft@2")[0].path
    checkpoint = tmp_path / "run/stages/sft/checkpoints/step-000002"
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.with_name("step-000004"), checkpoint)
    second = find_model(f"{tmp_path / 'run'}:sft@2")[0].path
    assert first != second
    made, other = (load_file(f"{path}/model.safetensors") for path in (first, second))
    assert any(not equal(made[name], other[name]) for name in made)


def test_what_was_written_beside_the_checkpoints_belongs_to_the_run(recipe: Tables, tmp_path: Path) -> None:
    again = changed(recipe, {"folder": str(tmp_path / "run"), "stages": ["sft"], "sft.keep_every": 2})
    find_model(f"{run(again)}:sft@2")
    run(again, restart=True)
    assert not (tmp_path / "run/stages/sft/exported").exists()


def test_the_samples_of_a_step_are_shown_by_its_name(keeping: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", f"{keeping}:rl@2"]) == 0
    shown = capsys.readouterr().out
    assert "step 2" in shown and "step 1" not in shown
    assert main(["sample", f"{keeping}:sft@2"]) == 2
    assert "has no samples" in capsys.readouterr().err

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
from thence.pipeline.trained import find_trained

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


def test_an_evaluation_says_how_to_get_a_model_of_one(keeping: Path) -> None:
    with pytest.raises(UserError, match="is a checkpoint") as refused:
        find_model(f"{keeping}:sft@2")
    assert "thence export" in str(refused.value)

"""Runs on ranks that are killed under torchrun and resumed in other layouts, as a user starts them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import ROOT
from tests.pipeline.on_ranks import largest_difference
from thence.toml import to_toml

sys.path.insert(0, str(ROOT / "benchmarks"))

from kill_and_move import Run, differences, try_kill  # pyright: ignore[reportMissingImports]

STEPS = {
    "sft": {"lr": 1e-2, "batch": 3, "steps": 4, "checkpoint_every": 2},
    "rl": {"lr": 1e-2, "prompts": 4, "rollouts": 4, "steps": 3, "max_tokens": 12, "checkpoint_every": 1},
}


@pytest.fixture(scope="module")
def recipes(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of SFT, then RL, on a tiny model: all weights in float32, adapters in float64."""
    place, found = tmp_path_factory.mktemp("recipes"), {}
    for name, model in {
        "full": {"compute_dtype": "float32"},
        "lora": {"compute_dtype": "float64", "lora": {"rank": 2, "modules_to_save": ["model.norm"]}},
    }.items():
        rl = {**STEPS["rl"], "reward": base["rl"]["reward"]}
        recipe = {**base, "stages": ["sft", "rl"], "model": {**base["model"], **model}, "sft": STEPS["sft"], "rl": rl}
        (place / f"{name}.toml").write_text(to_toml(recipe))
        found[name] = str(place / f"{name}.toml")
    return found


@pytest.mark.everything
@pytest.mark.slow
def test_two_ranks_that_are_killed_are_resumed_by_one_process_with_the_same_losses(
    recipes: dict[str, str], tmp_path: Path
) -> None:
    alone = Run(recipes["full"], {}, tmp_path / "alone")
    alone.to_the_end()
    found = try_kill(recipes["full"], {}, tmp_path, alone, "rl:1")
    assert found["not_equal"] == []
    assert found["relative"]["loss"] < 1e-5
    assert found["relative"]["weights"] < 1e-4


def thence(*arguments: object) -> str:
    command = [sys.executable, "-m", "thence", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    return done.stdout + done.stderr


@pytest.mark.everything
@pytest.mark.slow
def test_adapters_move_from_hsdp_on_four_ranks_to_two_and_one_and_are_merged(
    recipes: dict[str, str], tmp_path: Path
) -> None:
    alone, moved = (Run(recipes["lora"], {}, tmp_path / name) for name in ("alone", "moved"))
    alone.to_the_end()
    moved.killed_after("sft", 2, "hsdp", 4, replicas=2)
    moved.killed_after("rl", 1, "ddp", 2)
    assert "holds adapters (LoRA) alone" in thence("export", moved.folder, tmp_path / "exported")
    assert "not finished" in thence("merge", moved.folder, tmp_path / "so far")
    moved.to_the_end()
    found = differences(moved, alone)
    assert found["not_equal"] == []
    assert found["relative"]["loss"] < 1e-9
    for stage in ("sft", "rl"):
        assert largest_difference(moved.folder, alone.folder, stage) < 1e-12
    thence("export", moved.folder, tmp_path / "exported")
    stages = moved.folder / "stages"
    thence("merge", stages / "rl" / "adapter", tmp_path / "merged", "--base", stages / "sft" / "model")
    expected = load_file(stages / "rl" / "model" / "model.safetensors")
    for name in ("exported", "merged"):
        tensors = load_file(tmp_path / name / "model.safetensors")
        assert tensors.keys() == expected.keys()
        assert all(torch.allclose(tensors[key].double(), expected[key].double(), atol=1e-6) for key in expected), name
    so_far = load_file(tmp_path / "so far" / "model.safetensors")
    assert any((so_far[key].double() - expected[key].double()).abs().max() > 1e-4 for key in expected)

"""Measuring, the best step, kept checkpoints and patience with adapters and with weights cut over two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pipeline.on_ranks import drive, sampled, weights
from tests.pipeline.test_validation import best_step, done, measured
from tests.recipes import Tables, changed, file_recipe
from thence.train.run_models import find_trained

LAYOUTS = {
    "adapters": (1, {"model.lora": {"rank": 2}}),
    "shared weights": (2, {"parallel": "fsdp2"}),
    "adapters on shared weights": (2, {"parallel": "fsdp2", "model.lora": {"rank": 2}}),
}
STEADY = {"sft.schedule": "constant", "sft.warmup": 0.0, "sft.steps": 8, "sft.lr": 0.3, "sft.checkpoint_every": 1}
KEPT = {"sft.keep_every": 3, "sft.keep_last": 2, "rl.keep_every": 2}


def recipe(folder: Path) -> Tables:
    (folder / "own.py").write_text("def share(prompt, response, answer):\n    return len(set(response)) / 8\n")
    base = changed(file_recipe(folder), {**STEADY, "rl.steps": 4, "rl.lr": 1e-2})
    return changed(base, {"eval.reward": base["rl"]["reward"], "eval.samples": 2})


def same_bits(a: Path, b: Path, stage: str) -> bool:
    found, expected = weights(a, stage), weights(b, stage)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def kept(folder: Path, stage: str) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "stages" / stage / "checkpoints").glob("step-*"))


@pytest.mark.everything
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_measuring_and_keeping_change_no_bit_and_the_best_step_is_chosen(layout: str, tmp_path: Path) -> None:
    world, settings = LAYOUTS[layout]
    base = changed(recipe(tmp_path), settings)

    def runs(**asked: dict[str, Any]) -> list[Path]:
        folders = [tmp_path / name for name in asked]
        tables = [changed(base, {**flags, "folder": str(tmp_path / name)}) for name, flags in asked.items()]
        drive(tmp_path, [{"recipe": table, "world": world} for table in tables])
        for folder in folders:
            sampled(folder)  # shows what went wrong on a rank
        return folders

    often = {"sft.eval_every": 1, "rl.eval_every": 2}
    stages = {"stages": ["sft", "eval"]}
    chosen = {**stages, "sft.eval_every": 1, "sft.keep_best": "eval"}
    patient = {**chosen, "sft.patience": 2}
    plain, looked, best, early = runs(
        plain={}, looked={**often, **KEPT}, best={**chosen, **KEPT}, early={**patient, "sft.steps": 30, "sft.lr": 1e-30}
    )
    assert same_bits(looked, plain, "sft") and same_bits(looked, plain, "rl")
    assert list(measured(looked, "sft")) == list(range(1, 9)) and list(measured(looked, "rl")) == [2, 4]
    assert kept(looked, "sft") == [3, 6, 7, 8] and kept(looked, "rl") == [2, 4]
    values = measured(best, "sft")
    step = done(best, "sft")["best_step"]
    assert step == best_step(values) < 8, "the fixture has to get worse again, or this test says nothing"
    assert values == measured(looked, "sft") and kept(best, "sft") == sorted({3, 6, 7, 8, step})
    (short,) = runs(short={**stages, "sft.steps": step})
    assert same_bits(best, short, "sft") and not same_bits(best, plain, "sft")
    assert list(measured(early, "sft")) == [1, 2, 3] and done(early, "sft")["best_step"] == 1
    assert find_trained(f"{best}:sft@{step}").folder.name == f"step-{step:06d}"

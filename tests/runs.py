"""Whole runs: stopped in the middle, trained to the end, and what they left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import thence.pipeline.run as running
from tests.recipes import Tables
from thence.pipeline.run import run


def metrics(folder: Path, stage: str | None = None) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if stage is None or line["stage"] == stage]


def weights(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "stages" / stage / "model" / "model.safetensors")


def stop_in_rl(recipe: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    """SFT and the evaluation are done, and RL has just begun."""

    def interrupted(context: Any, stage: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(running, "run_rl", interrupted)
        run(recipe)


def trained(recipe: dict[str, Any], folder: Path, **rl: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Final weights and metrics of the recipe with other settings of its RL stage."""
    run({**recipe, "folder": str(folder), "rl": {**recipe["rl"], **rl}})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return load_file(folder / "stages" / "rl" / "model" / "model.safetensors"), lines

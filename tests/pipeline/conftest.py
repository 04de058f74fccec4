"""A finished run that the tests of a file copy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.recipes import Tables, changed, file_recipe, world_recipe
from thence.pipeline.run import run


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished run of SFT and an evaluation, to be copied."""
    at = tmp_path_factory.mktemp("kept")
    recipe = changed(file_recipe(at), {"stages": ["sft", "eval"]})
    run(recipe)
    return recipe


@pytest.fixture
def finished(kept: dict[str, Any], tmp_path: Path) -> Tables:
    """The recipe of a finished run in a folder of its own."""
    shutil.copytree(kept["folder"], tmp_path / "run")
    return {**kept, "folder": str(tmp_path / "run")}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Seven prompts and batches of four, so that a batch may hold a prompt twice."""
    place = tmp_path_factory.mktemp("base")
    rl = {"steps": 4, "max_tokens": 12, "checkpoint_every": 1}
    recipe = world_recipe(place, ["rl"], "float(sum(map(ord, response)) % 3 == 0)", data={"limit": 7}, rl=rl)
    recipe["model"]["compute_dtype"] = "float64"  # so that what differs is not rounding, which Adam makes large
    return recipe

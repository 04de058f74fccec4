"""A finished run that the tests of a file copy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.recipes import Tables, changed, file_recipe
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

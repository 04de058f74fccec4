"""Shared by all tests: one thread, tiny models and recipes, and which cases of a matrix are quick."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from tests.recipes import Recipes, Tables, file_recipe, world_recipe
from tests.tiny_model import make_tiny_model

torch.set_num_threads(1)

# the first example of a test may wait for an import or for a busy machine: no time limit on single examples
hypothesis.settings.register_profile("thence", deadline=None)
hypothesis.settings.load_profile("thence")


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """``tiny_model(dtype, kind, seed)``: a fresh model every call (see :func:`make_tiny_model`)."""
    return make_tiny_model


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test with the mark ``matrix(n)``, n cases spread evenly over all of them stand for the others, which get the
    mark ``everything``. Where the mark gives 0, ``make test`` runs none of them."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("matrix"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for found in cases.values():
        mark = found[0].get_closest_marker("matrix")
        assert mark is not None
        wanted = min(mark.args[0], len(found))
        kept = {number * len(found) // wanted for number in range(wanted)}
        for number, item in enumerate(found):
            if number not in kept:
                item.add_marker(pytest.mark.everything)


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    """SFT, RL and an evaluation on files; everything but the model's size is as a user would have it."""
    return file_recipe(tmp_path)


@pytest.fixture
def recipes(tmp_path: Path) -> Recipes:
    """``recipes(stages, **tables)``: a recipe of a tiny model, in the test's own folder."""
    return Recipes(tmp_path)


@pytest.fixture
def rl_recipe(tmp_path: Path) -> Tables:
    """Three steps of RL with a checkpoint after each."""
    rl = {"steps": 3, "max_tokens": 9, "clip_norm": 0, "checkpoint_every": 1}
    value, sizes = "response.count('1') / 9", {"max_position_embeddings": 128}
    return world_recipe(tmp_path, ["rl"], value, sizes, data={"limit": 12}, rl=rl)

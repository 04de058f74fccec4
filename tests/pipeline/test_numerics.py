"""A resumed run keeps the number of threads that was chosen for it, and so its last bits."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.recipes import Recipes
from thence import cores
from thence.pipeline import numerics
from thence.pipeline.numerics import settle_threads
from thence.pipeline.run import run


@pytest.fixture(autouse=True)
def threads() -> Iterator[int]:
    """One thread before and after."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_a_chosen_number_of_threads_is_that_of_the_first_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(cores.ASKED, cores.CHOSEN)
    with caplog.at_level(logging.INFO):
        settle_threads({"threads": 2})
    assert torch.get_num_threads() == 2
    assert "threads: 2, as at the run's first start (1 would be free now)" in caplog.text


@pytest.mark.parametrize("asked", ["", "auto"])  # auto: the user has set the number, which stays
def test_another_number_of_threads_stays_on_resume(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setenv(cores.ASKED, asked)
    settle_threads({"threads": 2})
    assert torch.get_num_threads() == 1


def test_a_first_start_has_nothing_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cores.ASKED, cores.CHOSEN)
    settle_threads({})
    assert torch.get_num_threads() == 1


def test_competing_threads_are_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(numerics, "crowded", lambda environment, threads: f"{threads} threads compete")
    settle_threads({})
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "1 threads compete" in caplog.text


def test_a_run_that_is_resumed_trains_with_the_threads_of_its_first_start(
    recipes: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    opened = sys.modules["thence.pipeline.run"].run_stage

    def watched(*arguments: Any) -> None:
        seen.append(torch.get_num_threads())
        opened(*arguments)

    monkeypatch.setattr("thence.pipeline.run.run_stage", watched)
    monkeypatch.setenv(cores.ASKED, cores.CHOSEN)
    recipe = recipes(["sft"], sft={"steps": 1})
    torch.set_num_threads(2)
    run(recipe)
    torch.set_num_threads(1)  # fewer cores were free when it was resumed
    run(recipe, {"sft.steps": 2})
    assert seen == [2, 2]

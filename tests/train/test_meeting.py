"""Processes that find each other, also when they are started again in a store that still holds what was before."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from thence.errors import UserError
from thence.train.parallel.meeting import PATIENCE, gather_all, join, meet, patience

SOON = timedelta(seconds=20)


def start(store: Any, world: int) -> list[str]:
    """The names that the ranks of one start agree on."""
    names = [""] * world

    def other(rank: int) -> None:
        names[rank] = join(store, rank, SOON)

    threads = [threading.Thread(target=other, args=(rank,)) for rank in range(1, world)]
    for thread in threads:
        thread.start()
    names[0] = gather_all(store, world, SOON)
    for thread in threads:
        thread.join()
    return names


def test_every_start_in_one_store_has_a_name_that_all_ranks_know() -> None:
    store = dist.HashStore()  # pyright: ignore
    first, second = start(store, 3), start(store, 3)
    assert len({*first}) == len({*second}) == 1
    assert first[0] != second[0]


def test_a_rank_that_died_in_the_start_before_is_not_taken_for_one_that_is_there() -> None:
    store = dist.HashStore()  # pyright: ignore
    store.set("thence/hello/1", "of a process that is dead")
    with pytest.raises(TimeoutError, match="rank 1, 2 of 3 is not there"):
        gather_all(store, 3, timedelta(seconds=0.3))
    assert len({*start(store, 3)}) == 1


def test_without_the_first_rank_another_one_does_not_wait_for_ever() -> None:
    with pytest.raises(dist.DistError):
        join(dist.HashStore(), 1, timedelta(seconds=0.3))  # pyright: ignore


def test_a_process_alone_is_told_that_the_others_did_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(PATIENCE, "1")
    with pytest.raises(UserError, match="rank 0 waited 1 seconds for all 2 processes") as refused:
        meet("gloo", 0, 2)
    assert PATIENCE in refused.value.remedy
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(UserError, match="MASTER_ADDR expected") as refused:
        meet("gloo", 0, 2)
    assert not dist.is_initialized()


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "1e9", ""])
def test_a_time_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATIENCE, text)
    with pytest.raises(UserError, match=PATIENCE):
        patience()

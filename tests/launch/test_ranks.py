"""Ranks of a run on several machines: which error is the run's, and when all of them start again."""

from __future__ import annotations

from typing import Any, Self

import pytest

from thence.errors import UserError
from thence.explain import LOST_EACH_OTHER
from thence.launch import ranks as module
from thence.launch.ranks import run_ranks
from thence.launch.ranks_on_ray import Seat, deal, environments, told_places

Said = list[tuple[int, dict[str, Any]]]


class Script:
    """Ranks of which each round says what it is told to, and then nothing more."""

    def __init__(self, *rounds: Said):
        self.rounds, self.open = list(rounds), False

    def __enter__(self) -> Self:
        self.open = True
        return self

    def __exit__(self, *error: object) -> None:
        self.open = False

    def events(self, seconds: float) -> Said:
        assert self.open
        return self.rounds.pop(0) if self.rounds else []


class Shown:
    def __init__(self) -> None:
        self.out, self.err, self.texts = b"", b"", []

    def printed(self, stream: str, text: bytes) -> None:
        setattr(self, stream, getattr(self, stream) + text)

    def said(self, text: str) -> None:
        self.texts.append(text)


def ended(code: int, tail: str = "") -> dict[str, Any]:
    return {"ended": code, "tail": tail, "where": "b"}


def run(*starts: Script, ranks: int = 2, restarts: int = 3) -> tuple[int, Shown, list[bool]]:
    shown, again, left = Shown(), [], list(starts)

    def begin(is_again: bool) -> Script:
        again.append(is_again)
        return left.pop(0)

    code = run_ranks(begin, ranks, restarts, shown)
    assert not any(start.open for start in starts)
    return code, shown, again


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE", 0.01)
    monkeypatch.setattr(module, "SILENCE", 0.05)


def test_what_the_first_rank_prints_is_shown_and_nothing_of_the_others() -> None:
    said: Said = [(0, {"out": b"step 1\n"}), (1, {"out": b"mine\n", "err": b"mine\n"}), (0, {"err": b"careful\n"})]
    code, shown, again = run(Script(said, [(1, ended(0))], [(0, ended(0))]))
    assert code == 0 and again == [False]
    assert shown.out == b"step 1\n" and shown.err == b"careful\n" and not shown.texts


def test_an_error_that_all_ranks_raise_is_told_once_by_the_first_and_its_code_is_the_run_s() -> None:
    wrong = "thence: sft.lr: too high\n  remedy: lower it\n"
    code, shown, _ = run(Script([(1, ended(2))], [(0, {"err": wrong.encode()}), (0, ended(2, wrong))]))
    assert code == 2 and not shown.texts and shown.err == wrong.encode()


def test_a_rank_that_was_killed_is_named_whoever_noticed_first() -> None:
    lost = f"thence: {LOST_EACH_OTHER}: reset by peer\n"
    code, shown, _ = run(Script([(0, ended(1, lost))], [(1, ended(-9))]))
    assert code == 1
    assert shown.texts == ["rank 1 on node b was ended by signal 9; the same command resumes from the last checkpoint"]


def test_what_another_rank_says_of_its_own_fault_is_shown_besides() -> None:
    own, first = "thence: ValueError: gone\n", "thence: rank 1 failed: ValueError: gone\n"
    code, shown, _ = run(Script([(1, ended(1, own)), (0, ended(2, first))]))
    assert code == 2 and shown.texts == [f"rank 1 on node b said:\n{own.rstrip()}"]


def test_the_exit_code_is_that_of_a_rank_with_an_error_of_its_own_and_not_of_one_that_lost_it() -> None:
    lost = f"thence: {LOST_EACH_OTHER}: reset by peer\n"
    code, shown, _ = run(Script([(0, ended(1, lost)), (1, ended(2, "thence: no data\n"))]))
    assert code == 2 and shown.texts == ["rank 1 on node b said:\nthence: no data"]


def test_ranks_that_hang_after_one_has_failed_are_not_waited_for() -> None:
    code, _, _ = run(Script([(1, ended(3, "thence: no\n"))]))
    assert code == 3


@pytest.mark.parametrize("noticed", [False, True])
def test_all_ranks_start_again_when_a_machine_is_lost_even_if_the_others_fail_first(noticed: bool) -> None:
    lost = f"thence: {LOST_EACH_OTHER}: reset by peer\n"
    first: Said = [(0, ended(1, lost))] if noticed else []
    starts = Script(first, [], [(1, {"lost": "the node of rank 1 was lost"})]), Script([(0, ended(0)), (1, ended(0))])
    code, shown, again = run(*starts)
    assert code == 0 and again == [False, True]
    assert len(shown.texts) == 1 and "start again from the last checkpoint" in shown.texts[0]
    assert "restart 1 of 3" in shown.texts[0]


def test_a_machine_that_is_lost_too_often_ends_the_run() -> None:
    def gone() -> Script:
        return Script([(1, {"lost": "the node of rank 1 was lost"})])

    with pytest.raises(UserError, match="the ranks were started again 2 times") as told:
        run(gone(), gone(), gone(), restarts=2)
    assert told.value.field == "--restarts" and "resumes from the last checkpoint" in told.value.remedy
    with pytest.raises(UserError, match="0 times"):
        run(gone(), restarts=0)


def test_ranks_of_a_node_are_neighbours_and_have_torchrun_s_environment() -> None:
    places = [
        Seat("A", "a", "10.0.0.1", 1111, ["3"]),
        Seat("B", "b", "10.0.0.2", 2222, ["0"]),
        Seat("A", "a", "10.0.0.1", 3333, ["1"]),
    ]
    dealt = [places[number] for number in deal(places)]
    assert [place.id for place in dealt] == ["A", "A", "B"]
    variables = environments(dealt, threads=4)
    shared = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1111", "WORLD_SIZE": "3", "OMP_NUM_THREADS": "4"}
    assert all(own.items() >= shared.items() for own in variables)
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "CUDA_VISIBLE_DEVICES")
    assert [tuple(own[name] for name in names) for own in variables] == [
        ("0", "0", "2", "0", "3,1"), ("1", "1", "2", "0", "3,1"), ("2", "0", "1", "1", "0"),
    ]  # fmt: skip
    assert told_places(dealt) == "0 to 1 on a [A], 2 on b [B]"

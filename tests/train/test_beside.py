"""Work beside the training, in one process: what fails is raised once, and one piece is done at a time."""

from __future__ import annotations

import threading
import time

import pytest

from thence.train.parallel import Beside, SingleProcess


def fail() -> None:
    raise OSError(28, "no space left")


def test_a_failure_is_raised_at_the_next_look_and_not_again() -> None:
    beside = Beside(SingleProcess())
    beside.look()
    go = threading.Event()
    beside.begin(lambda: go.wait(10) and fail())
    beside.look()  # it has not failed yet
    go.set()
    end = time.monotonic() + 10
    with pytest.raises(OSError, match="no space left"):
        while time.monotonic() < end:
            beside.look()
            time.sleep(0.01)
    beside.look()
    beside.wait()
    beside.close()


def test_the_next_piece_waits_for_the_one_before_and_hears_of_its_failure() -> None:
    beside, done = Beside(SingleProcess()), []
    beside.begin(lambda: (time.sleep(0.2), done.append("first")))
    beside.begin(lambda: done.append(f"second after {done}"))
    beside.wait()
    assert done == ["first", "second after ['first']"]
    beside.begin(fail)
    with pytest.raises(OSError):
        beside.begin(lambda: done.append("third"))
    beside.close()
    assert len(done) == 2


def test_closing_lets_what_is_under_way_end_and_raises_nothing() -> None:
    beside, done = Beside(SingleProcess()), []
    beside.begin(lambda: (time.sleep(0.2), done.append(1), fail()))
    beside.close()
    assert done == [1]

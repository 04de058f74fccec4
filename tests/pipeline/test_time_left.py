"""The time that is left of a run is what its steps say, and what nothing is known of is named."""

from __future__ import annotations

import pytest

from thence.pipeline.time_left import WINDOW, Clock, Remaining


def started() -> Clock:
    clock = Clock()
    clock.begin(["eval-base", "sft", "eval-sft", "rl", "eval-rl"])
    clock.stage("eval-base", 2, 0, 0.0)
    clock.step(5.0)
    clock.step(10.0)
    return clock


def test_a_later_stage_of_a_known_kind_counts_and_one_of_an_unknown_kind_is_named() -> None:
    clock = started()
    clock.stage("sft", 100, 0, 10.0)
    assert clock.left(11.0) == Remaining(None, None, ("rl",)), "before its first step nothing is known"
    for step in range(1, 11):
        clock.step(10.0 + 2.0 * step)
    left = clock.left(30.0)
    assert left.stage == pytest.approx(180.0)
    assert left.known == pytest.approx(180.0 + 10.0 + 10.0)  # two evaluations like the first
    assert str(left) == "about 3 min 20 s and rl left"
    clock.stage("eval-sft", 2, 0, 200.0)
    clock.step(204.0)
    assert clock.left(204.0).unknown == ("rl",)


def test_the_speed_is_that_of_the_last_steps_and_time_goes_by_between_steps() -> None:
    clock = Clock()
    clock.begin(["sft"])
    clock.stage("sft", 1000, 0, 0.0)
    now = 0.0
    for step in range(100):
        now += 10.0 if step < 50 else 1.0
        clock.step(now)
    assert clock.left(now).stage == pytest.approx(900.0), f"the last {WINDOW} steps took a second each"
    assert clock.left(now + 0.5).stage == pytest.approx(899.5)


def test_a_resumed_stage_counts_as_a_whole_one_for_those_of_its_kind() -> None:
    clock = Clock()
    clock.begin(["sft-a", "sft-b"])
    clock.stage("sft-a", 10, 8, 0.0)
    clock.step(3.0)
    clock.step(6.0)
    assert clock.end(6.0) == 6.0
    clock.stage("sft-b", 10, 0, 6.0)
    clock.step(9.0)
    clock.begin(["sft-c"])
    assert clock.left(9.0).known == pytest.approx(27.0 + 30.0), "ten steps of 3 s, though only two were taken here"
    assert Clock().end(1.0) is None


def test_between_two_stages_those_of_a_known_kind_count() -> None:
    clock = Clock()
    clock.begin(["sft", "eval-sft", "sft-b"])
    clock.stage("sft", 1, 0, 0.0)
    clock.step(7.0)
    clock.end(7.0)
    left = clock.left(8.0)
    assert (left.stage, left.known, left.unknown) == (None, pytest.approx(7.0), ("eval-sft",))
    assert str(left) == "about 7 s and eval-sft left"


def test_a_stages_time_follows_from_its_first_three_steps_and_the_first_counts_once() -> None:
    clock = Clock()
    clock.begin(["sft"])
    clock.stage("sft", 10, 0, 100.0)
    for now in (108.0, 110.0):
        clock.step(now)
    assert clock.foreseen(10) is None, "two steps are too few"
    clock.step(112.0)
    assert clock.foreseen(10) == pytest.approx(8.0 + 9 * 2.0)
    for step in range(1, 8):
        clock.step(112.0 + 3.0 * step)
    clock.end(140.0)
    assert clock.times["sft"].foreseen == pytest.approx(26.0), "what came later changes nothing"
    assert (clock.times["sft"].steps, clock.times["sft"].took) == (10, pytest.approx(33.0))
    clock.stage("sft-short", 3, 0, 200.0)
    for now in (201.0, 202.0, 203.0):
        clock.step(now)
    clock.end(204.0)
    assert "sft-short" not in clock.times, "all of its steps were those that it is foreseen from"

"""How long a run will still take: what is known is added up, what is not is named."""

from __future__ import annotations

from thence.pipeline.time_left import Clock


def test_the_time_left_counts_all_stages_of_a_known_kind_and_names_the_others() -> None:
    clock = Clock()
    clock.begin(["eval-base", "sft", "eval-sft", "rl", "eval-rl"])
    clock.stage("eval-base", 2, 0, 0.0)
    assert clock.left(0.0).stage is None and str(clock.left(0.0)) == ""
    clock.step(5.0)
    clock.step(10.0)
    clock.stage("sft", 10, 0, 10.0)
    clock.step(11.0)
    left = clock.left(11.0)
    assert (left.stage, left.known, left.unknown) == (9.0, 29.0, ("rl",))  # two evaluations of 10 s each
    assert str(left) == "about 29 s and rl left"
    clock.stage("rl", 4, 0, 20.0)
    clock.step(22.0)
    assert str(clock.left(23.0)) == "about 15 s left"  # three steps of 2 s, of which one second has gone, and 10 s


def test_a_resumed_stage_counts_as_if_it_had_run_here_from_its_first_step() -> None:
    clock = Clock()
    clock.begin(["sft", "sft-more", "sft-last"])
    clock.stage("sft", 10, 8, 0.0)
    clock.step(1.0)
    clock.step(2.0)
    clock.stage("sft-more", 10, 0, 2.0)
    clock.step(3.0)
    assert clock.left(3.0).known == 19.0  # nine seconds of its own; ten of the last, though two were measured

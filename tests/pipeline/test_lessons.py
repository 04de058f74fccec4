"""Warnings that matter: each once a stage, with what helps."""

from __future__ import annotations

import logging

import pytest

from thence.pipeline.lessons import CUT_STEPS, DEAD_STEPS, Watch

LIVE = {"dead_groups": 0.5, "reward": 0.5, "reward_std": 0.5, "truncated": 0.1}


def warned(caplog: pytest.LogCaptureFixture, *lines: dict[str, float]) -> list[str]:
    watch = Watch("rl", "leave-out")
    with caplog.at_level(logging.WARNING, logger="thence"):
        for step, line in enumerate(lines, 1):
            watch.look(step, line)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("wrong", "after", "words"),
    [
        ({"dead_groups": 1.0, "reward": 1.0, "reward_std": 0.0}, DEAD_STEPS, ("every group were equal", "reward 1 at")),
        ({"dead_groups": 1.0, "reward": 0.0, "reward_std": 0.0}, DEAD_STEPS, ("all of them 0", "SFT first")),
        ({"truncated": 0.51}, CUT_STEPS, ("51% of the responses", "Raise max_tokens")),
    ],
)
def test_each_is_said_once_and_not_before_it_is_sure(
    wrong: dict[str, float], after: int, words: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    line = LIVE | wrong
    assert warned(caplog, *[line] * (after - 1), LIVE, *[line] * (after - 1)) == []
    said = warned(caplog, *[*[line] * after, LIVE] * 3)
    assert len(said) == 1 and all(word in said[0] for word in ("rl: ", *words))


def test_half_of_the_responses_cut_is_not_over_half(caplog: pytest.LogCaptureFixture) -> None:
    assert warned(caplog, *[LIVE | {"truncated": 0.5}] * 9) == []

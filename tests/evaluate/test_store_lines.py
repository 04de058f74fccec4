"""What is wrong with a line of an evaluation's store is said in words."""

from __future__ import annotations

from typing import Any

import pytest

from thence.evaluate.refusals import Refusal
from thence.evaluate.store import GradeLine, Sample
from thence.evaluate.store_lines import wrong_with

SAMPLE = {"problem": "p", "sample": 0, "seed": 2**62, "prompt": [["user", "x"]], "question": "q", "answer": "1"}
SAMPLE |= {"text": "t", "tokens": 3, "finish": "stop"}
GRADE = {"problem": "p", "sample": 1, "grader": "exact", "version": "v", "verdict": "right", "score": 1}


@pytest.mark.parametrize(
    ("kind", "line", "changes", "why"),
    [
        (Sample, SAMPLE, {}, None),
        (Sample, SAMPLE, {"answer": None, "tokens": None, "room": None, "of a later version": 1}, None),
        (Sample, SAMPLE, {"sample": "1"}, "sample is text"),
        (Sample, SAMPLE, {"sample": True}, "sample is true"),
        (Sample, SAMPLE, {"text": None}, "text is nothing (null)"),
        (Sample, SAMPLE, {"plain": 1}, "plain is a whole number"),
        (Sample, SAMPLE, {"prompt": [["user", 3]]}, "prompt holds a whole number"),
        (Sample, SAMPLE, {"options": ["a", 1]}, "options holds a whole number"),
        (GradeLine, GRADE, {"extracted": None}, None),
        (GradeLine, GRADE, {"components": {"form": 1, "length": 0.5}}, None),
        (GradeLine, GRADE, {"components": {"form": "1"}}, "components holds text"),
        (GradeLine, GRADE, {"verdict": "maybe"}, "no such verdict: 'maybe'"),
        (GradeLine, GRADE, {"score": "1"}, "score is text"),
        (GradeLine, {}, {}, "it lacks problem"),
        (Refusal, {"problem": "p"}, {}, "it lacks sample"),
    ],
)
def test_a_line_is_whole_or_says_what_is_wrong(
    kind: type, line: dict[str, Any], changes: dict[str, Any], why: str | None
) -> None:
    assert wrong_with(kind)({**line, **changes}) == why

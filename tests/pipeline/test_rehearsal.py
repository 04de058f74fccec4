"""A method that falls back on demonstrations is tried with right responses, and without any, before the first step."""

from __future__ import annotations

from typing import Any

import pytest

from tests.methods.trapo_cases import DEMONSTRATION, levels
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import UserError
from thence.methods.base import Method, Sampler
from thence.methods.grpo import Grpo
from thence.methods.trapo import Trapo
from thence.pipeline.rehearsal import rehearse
from thence.recipe import Rl

PROMPTS = [Prompt(i, (2, 3), DEMONSTRATION) for i in range(3)]


def heard(method: Method, monkeypatch: pytest.MonkeyPatch) -> list[list[Trajectory]]:
    """What a method composes in its rehearsal."""
    found: list[list[Trajectory]] = []
    compose = type(method).compose

    def listened(method: Any, sampler: Sampler, prompts: int, n: int) -> list[Trajectory]:
        found.append(compose(method, sampler, prompts, n))
        return found[-1]

    monkeypatch.setattr(type(method), "compose", listened)
    rehearse(method, Rl(prompts=2, rollouts=8), PROMPTS)
    return found


def test_trapo_is_tried_unguided_and_guided(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, hopeless = heard(Trapo(), monkeypatch)
    assert levels(plain[:6]) == [0] * 6  # half of the first four are right
    assert levels(hopeless) == [0, 0, 0, 0, 1, 1, 2, 3] * 2
    assert [t.score for t in hopeless[:8]] == [0.0] * 7 + [1.0]


def test_a_method_without_demonstrations_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = heard(Grpo(), monkeypatch)
    assert {t.score for t in found} == {0.0, 1.0}


def test_what_fails_only_where_no_response_is_right_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*given: Any, **named: Any) -> int:
        raise UserError("no cut", remedy="none")

    monkeypatch.setattr("thence.methods.trapo.cut", refuses)
    stage = Rl(prompts=2, rollouts=8)
    rehearse(Trapo({"thresholds": [0.0, 0.0, 0.0]}), stage, PROMPTS)  # no mean is below zero
    with pytest.raises(UserError, match="no cut"):
        rehearse(Trapo({"thresholds": [0.5, 0.5, 0.5]}), stage, PROMPTS)

"""The audit of reinforcement learning, on an independent GRPO loop with every setting and every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import ROOT
from tests.audit.policy_cases import MISTAKES, audit, random_objective
from thence.audit import PolicyObjective
from thence.audit.policy.facts import Rollout
from thence.audit.policy.predict import advantages
from thence.errors import UserError


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policy")


@pytest.mark.matrix(3)
@pytest.mark.parametrize("seed", range(5))
def test_a_clean_trainer_of_any_objective_is_verified(folder: Path, seed: int) -> None:
    """The closed form predicts what autograd did to 1e-5 of the largest weight, in all steps."""
    result = audit(folder, random_objective(seed))
    assert result.status == "judged", result.reason
    assert not result.faults, result.faults
    assert len(result.steps) == 4
    for step in result.steps:
        tokens = [token for row in step.sequences for token in row.tokens]
        ideal, weight = (np.array([getattr(t, name) for t in tokens]) for name in ("ideal", "weight"))
        # Equal where every token of a step is clipped: then all of them are zero.
        assert np.abs(weight - ideal).max() <= 1e-5 * np.abs(ideal).max()


@pytest.mark.parametrize("surrogate", ["clip", "weight"])
def test_tokens_corrected_under_a_ratio_of_responses_are_no_mistake(folder: Path, surrogate: str) -> None:
    """The gradient of a response's ratio reaches all its tokens, so their corrections are averaged."""
    asked = {"ratio": "sequence", "surrogate": surrogate, "correction": "truncate", "correction_cap": 1.1}
    result = audit(folder, asked, steps=2)
    assert result.status == "judged" and not result.faults, result.faults


@pytest.mark.matrix(6)
@pytest.mark.parametrize("mistake", list(MISTAKES)[::5])
def test_a_mistake_is_named(folder: Path, mistake: str) -> None:
    """Every fifth; benchmarks/audit_policy.py takes all, many times."""
    asked, finding = MISTAKES[mistake]
    result = audit(folder, asked, mistake)
    assert finding in {fault.id for fault in result.faults}, (result.reason, result.faults)
    assert len(result.faults) == 1, result.faults


@pytest.mark.parametrize("surrogate", ["tv", "binary-kl", "band"])
def test_a_clean_trust_region_is_verified(folder: Path, surrogate: str) -> None:
    """Some tokens lie beyond the bounds, and ratios beyond the cap."""
    low, high = (2e-4, 3e-4) if surrogate == "binary-kl" else (0.003, 0.004)
    asked = {"surrogate": surrogate, "clip_low": low, "clip_high": high, "dual_clip": 1.1, "pull": 0.2}
    result = audit(folder, asked)
    assert result.status == "judged" and not result.faults, (result.reason, result.faults)
    assert result.policy is not None
    assert {"clipping above", "clipping below", "dual clip"} <= set(result.policy.verified)


@pytest.mark.parametrize("mistake", ["trust-as-clip", "trust-as-band", "clip-missing", "pull-missing", "pull-double"])
def test_a_mistake_in_a_trust_region_is_named(folder: Path, mistake: str) -> None:
    asked = {"surrogate": "tv", "clip_low": 0.003, "clip_high": 0.004, "pull": 0.3}
    result = audit(folder, asked, mistake)
    named = {"clip-missing": "clip-missing", "pull-missing": "kl-coefficient", "pull-double": "kl-coefficient"}
    assert [fault.id for fault in result.faults] == [named.get(mistake, "clip-surrogate")], result.faults


def test_dropped_negative_advantages_are_not_taken_for_a_clip_range(folder: Path) -> None:
    """A lower bound above every ratio would drop them too; it was once called "or not at all"."""
    result = audit(folder, {"scale": "none"}, "negative-dropped")
    assert {fault.id for fault in result.faults} == {"advantage"}, result.faults


@pytest.mark.parametrize("asked", [{}, {"ratio": "sequence"}, {"scale": "none", "kl": 0.05}])
def test_steps_that_are_not_taken_are_named_before_what_would_leave_the_parameters_alone_too(
    folder: Path, asked: dict[str, Any]
) -> None:
    """A level of the ratio at which all is clipped, for example, once led."""
    result = audit(folder, asked, "steps-lost")
    assert {fault.id for fault in result.faults} == {"no-step"}, result.faults
    assert "changed no parameter" in result.faults[0].detail and "2" in result.faults[0].detail


def test_the_example_of_the_docs_is_named() -> None:
    text = (ROOT / "docs/audit-rl.md").read_text(encoding="utf-8")
    scope: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], scope)  # its own assert is that the report is not ok
    assert {fault.id for case in scope["report"].cases for fault in case.faults} == {"clip-missing"}
    assert scope["report"].verdict.exit_code == 1


def test_a_part_without_effect_is_not_verified(folder: Path) -> None:
    """The first step alone: every ratio is one, so nothing is said of ratio, clipping and KL."""
    result = audit(folder, {"kl": 0.05}, steps=1)
    assert not result.faults and result.policy is not None
    unseen = {"ratio", "clipping above", "clipping below", "level of the ratio", "KL coefficient"}
    assert unseen <= set(result.policy.open)
    assert not unseen & set(result.policy.verified)
    whole = audit(folder, {"kl": 0.05})
    assert whole.policy is not None
    assert unseen <= set(whole.policy.verified)


def test_a_reward_that_equals_its_baseline_has_no_advantage_left_by_rounding() -> None:
    """0.8 - (0.5 + 0.5 + 2 + 0.8 + 0 + 1) / 6 is 1e-16, which would be all of a step where all else is clipped."""
    rewards = (0.5, 0.5, 2.0, 0.8, 0.0, 1.0)
    rollouts = [Rollout(reward=reward, group=i // 3) for i, reward in enumerate(rewards)]
    found = advantages(rollouts, PolicyObjective(baseline="batch", scale="none"), np.zeros(6))
    assert found[3] == 0.0 and np.allclose(found, np.array(rewards) - 0.8)


def test_wrong_settings_are_refused() -> None:
    for said in ({"baselin": "group"}, {"baseline": "mean"}, {"temperature": 0.0}, {"normaliser": "mean"}):
        with pytest.raises(UserError):
            PolicyObjective.of(said)

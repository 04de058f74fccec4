"""The audit of reinforcement learning, on an independent GRPO loop with every setting and every mistake."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.audit.policy_cases import MISTAKES, audit, random_objective


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policy")


@pytest.mark.matrix(3)
@pytest.mark.parametrize("seed", range(30))
def test_a_clean_trainer_of_any_objective_is_verified(folder: Path, seed: int) -> None:
    """The closed form predicts what autograd did to 1e-5 of every weight, in all steps."""
    result = audit(folder, random_objective(seed))
    assert result.status == "judged", result.reason
    assert not result.faults, result.faults
    assert len(result.steps) == 4
    for step in result.steps:
        tokens = [token for row in step.sequences for token in row.tokens]
        ideal, weight = (np.array([getattr(t, name) for t in tokens]) for name in ("ideal", "weight"))
        assert np.abs(weight - ideal).max() < 1e-4 * np.abs(ideal).max()


@pytest.mark.matrix(6)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(folder: Path, mistake: str) -> None:
    asked, finding = MISTAKES[mistake]
    result = audit(folder, asked, mistake)
    assert finding in {fault.id for fault in result.faults}, (result.reason, result.faults)
    assert len(result.faults) == 1, result.faults

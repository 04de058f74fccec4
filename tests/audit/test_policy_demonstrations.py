"""Demonstrations inside a policy objective: token weights in closed form against autograd on the formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from thence.audit.policy.facts import PolicyStep, Rollout
from thence.audit.policy.objective import PolicyObjective
from thence.audit.policy.predict import row_advantages, token_weights

LENGTHS = (3, 2, 4, 3)


def make_step() -> PolicyStep:
    """One group of three rollouts and a demonstration, all ratios away from one."""
    draw = np.random.default_rng(0)
    rollouts = tuple(Rollout(r, 0, demonstration=i == 3) for i, r in enumerate((0.0, 1.0, 0.25, 2.0)))
    tokens = sum(LENGTHS)
    logp = -draw.uniform(0.1, 3.0, tokens)
    old = logp + draw.normal(0.0, 0.1, tokens)
    row = np.repeat(np.arange(4), LENGTHS)
    place = np.concatenate([np.arange(n) for n in LENGTHS])
    zeros = np.zeros(4, int)
    return PolicyStep(rollouts, np.arange(4), zeros, zeros, row, place, logp, old, old, old)


LUFFY = {"demonstration": "shape", "demonstration_advantage": True}
FORMULAS = {
    "luffy": (LUFFY, lambda logp, a: a * logp.exp() / (logp.exp() + 0.1)),
    "mixed policy": (LUFFY | {"demonstration": "probability"}, lambda logp, a: a * logp.exp()),
    "likelihood": ({"demonstration_weight": 0.3}, lambda logp, a: 0.3 * logp),
    "chord": (
        {"demonstration": "uncertain", "demonstration_weight": 0.1, "own_weight": 0.9},
        lambda logp, a: 0.1 * (logp.exp() * (1 - logp.exp())).detach() * logp,
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_weights_are_the_derivative_of_the_formula(name):
    said, formula = FORMULAS[name]
    step = make_step()
    asked = PolicyObjective.of({"scale": "none", "clip_low": None, "clip_high": None, **said})
    advantage = torch.tensor(row_advantages(step, asked))[torch.tensor(step.row)]
    logp = torch.tensor(step.logp, requires_grad=True)
    shown = torch.tensor(step.demonstrated())[torch.tensor(step.row)]
    own = said.get("own_weight", 1.0) * advantage * (logp - torch.tensor(step.old)).exp()
    value = torch.where(shown, formula(logp, advantage), own).sum() / len(logp)
    (expected,) = torch.autograd.grad(value, logp)
    assert np.allclose(token_weights(step, asked), expected.numpy(), rtol=1e-12)


def test_a_baseline_of_own_responses_leaves_the_demonstration_out():
    step = make_step()
    own = PolicyObjective.of({"scale": "none", "compared": "own"})
    joint = PolicyObjective.of({"scale": "none"})
    assert np.allclose(row_advantages(step, own)[:3], np.array([0.0, 1.0, 0.25]) - 1.25 / 3)
    assert np.allclose(row_advantages(step, joint), np.array([0.0, 1.0, 0.25, 2.0]) - 3.25 / 4)

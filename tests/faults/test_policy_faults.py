"""Faults of reinforcement learning: the weights of each one's step are those of the objective that it takes it for."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import numpy as np
import pytest

from tests.audit import policy_mutation as made
from tests.audit.policy_mutation import PolicyProbe, Taken
from thence.audit.policy.facts import PolicyStep
from thence.audit.policy.objective import PolicyObjective
from thence.audit.policy.predict import row_advantages, token_weights
from thence.errors import UserError
from thence.faults.catalogue import FAULTS
from thence.faults.step import FaultyStep

CLOSE = 2e-4
PROBES = int(os.environ.get("THENCE_AUDIT_PROBES", "1"))
NAMES = [fault.name for fault in made.policy_faults()]

CHANGED = {
    "uninformative-counted": lambda asked: {"counted": "all"},
    "baseline-batch": lambda asked: {"baseline": "batch"},
    "baseline-missing": lambda asked: {"baseline": "none"},
    "std-biased": lambda asked: {"bessel": False},
    "std-of-batch": lambda asked: {"scale": "batch"},
    "uninformative-left-out": lambda asked: {"counted": "informative"},
    "truncated-trained": lambda asked: {"truncated": "train"},
    "temperature-ignored": lambda asked: {"temperature": 1.0},
    "clip-missing": lambda asked: {"clip_low": math.inf, "clip_high": math.inf, "dual_clip": math.inf},
    "clip-symmetric": lambda asked: {"clip_high": asked.clip_low},
    "dual-clip-missing": lambda asked: {"dual_clip": math.inf},
    "ratio-by-sequence": lambda asked: {"ratio": "sequence"},
    "ratio-by-token": lambda asked: {"ratio": "token"},
    "kl-k1": lambda asked: {"estimator": "k1"},
    "kl-doubled": lambda asked: {"kl": 2 * asked.kl},
    "kl-halved": lambda asked: {"kl": asked.kl / 2},
    "kl-missing": lambda asked: {"kl": 0.0},
    "kl-in-reward": lambda asked: {"kl_in": "reward"},
    "importance-missing": lambda asked: {"correction": "none"},
    "importance-uncapped": lambda asked: {"correction_cap": math.inf},
    "importance-masked": lambda asked: {"correction": "mask"},
}
"""Settings that the fault takes the place of."""
OTHERWISE = {
    "old-stale", "groups-interleaved", "groups-shifted", "advantage-negated", "group-means", "clip-both-sides",
    "ratio-one", "kl-to-old", "importance-inverted", "environment-trained",
}  # fmt: skip
"""Restated below from the facts of the step."""


def restated(name: str, probe: PolicyProbe, taken: Taken, number: int) -> np.ndarray:
    """The weights of a step with the fault, from its definition."""
    asked = probe.asked
    changed = replace(asked, **CHANGED[name](asked)) if name in CHANGED else asked
    step = made.policy_steps(probe, taken, changed.temperature)[number]
    if name in CHANGED:
        return token_weights(step, changed)
    if name == "advantage-negated":
        return token_weights(negated(step), asked)
    if name in ("groups-interleaved", "groups-shifted"):
        return token_weights(regrouped(step, probe, name), asked)
    if name == "environment-trained":
        bare = tuple(replace(rollout, environment=()) for rollout in step.rollouts)
        return token_weights(replace(step, rollouts=bare), asked)
    if name == "old-stale":
        before = probe.versions[number] - 1
        if before < 0:
            return token_weights(step, asked)
        model = made.make_model(probe.seed, made.torch.float64)
        old = made.logps(model, taken.states[before], probe, probe.steps[number], asked.temperature)
        return token_weights(replace(step, old=old, sampler=step.sampler + old - step.old), asked)
    if name == "kl-to-old":
        return token_weights(replace(step, reference=step.old), asked)
    if name == "ratio-one":
        return token_weights(replace(step, old=step.logp, sampler=step.sampler + step.logp - step.old), asked)
    if name == "importance-inverted":
        return token_weights(replace(step, sampler=2 * step.old - step.sampler), asked)
    if name == "clip-both-sides":
        ratio = np.exp(step.logp - step.old)
        inside = (ratio <= 1 + asked.clip_high) & (ratio >= 1 - asked.clip_low)
        free = replace(asked, clip_low=math.inf, clip_high=math.inf, dual_clip=math.inf)
        kl = token_weights(step, replace(free, baseline="group")) - token_weights(step, replace(free, kl=0.0))
        return np.where(inside, token_weights(step, replace(free, kl=0.0)), 0.0) + kl
    assert name == "group-means"
    return by_group(step, asked)


def negated(step: PolicyStep) -> PolicyStep:
    return replace(step, rollouts=tuple(replace(r, reward=-r.reward) for r in step.rollouts))


def regrouped(step: PolicyStep, probe: PolicyProbe, name: str) -> PolicyStep:
    size, found = probe.size, []
    first = probe.rollouts[0].group
    members = sum(r.group == first for r in probe.rollouts)
    for i, rollout in enumerate(step.rollouts):
        place = i % size
        wrong = place % (size // members) if name == "groups-interleaved" else (place + 1) % size // members
        found.append(replace(rollout, group=wrong))
    return replace(step, rollouts=tuple(found))


def by_group(step: PolicyStep, asked: PolicyObjective) -> np.ndarray:
    """A token mean inside every group, averaged over the groups of the step."""
    weights = token_weights(step, asked)
    whole = step.counted(~step.environment() & ~(step.truncated()[step.row] & (asked.truncated == "mask")), 0.0)
    group = np.array([step.rollouts[e].group for e in step.example])
    tokens = {g: whole.lengths[group == g].sum() for g in group}
    factor = np.array([whole.lengths.sum() / (len(tokens) * max(tokens[g], 1)) for g in group])
    return weights * factor[step.row]


def test_every_fault_is_restated_here():
    assert set(CHANGED) | OTHERWISE == set(NAMES)
    assert len(NAMES) >= 20


@pytest.mark.matrix(5)
@pytest.mark.parametrize("name", NAMES)
def test_the_weights_of_a_fault_are_those_of_what_it_takes_the_objective_for(name):
    for probe in made.probes(FAULTS[name], PROBES, seed=3):
        taken = made.take_steps(probe, [name])
        for number, window in enumerate(taken.windows):
            found = made.weights_of(probe, window.batch, taken.states[number])
            expected = restated(name, probe, taken, number)
            assert np.linalg.norm(found - expected) <= CLOSE * np.linalg.norm(expected), (name, number)


def test_without_faults_the_weights_are_those_that_were_asked_for():
    for probe in made.probes(None, 2 * PROBES, seed=4):
        taken = made.take_steps(probe, [])
        for number, window in enumerate(taken.windows):
            step = made.policy_steps(probe, taken, probe.asked.temperature)[number]
            found = made.weights_of(probe, window.batch, taken.states[number])
            expected = token_weights(step, probe.asked)
            assert np.linalg.norm(found - expected) <= CLOSE * np.linalg.norm(expected)
            assert row_advantages(step, probe.asked).shape == (len(window.batch.rows),)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_what_the_fault_is_about_is_refused_by_name(name):
    """A supervised batch has no rollouts at all."""
    from tests.faults.restated import SETTINGS, make_batch
    from thence.train.parallel import SingleProcess
    from thence.train.policy import Policy

    model = made.make_model(0, made.torch.float64)
    optimizer = made.torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(UserError, match=f"{name} is a fault of what this batch lacks"):
        FaultyStep([name], micro_batch=2)(Policy(model), optimizer, make_batch(), SingleProcess(), SETTINGS)

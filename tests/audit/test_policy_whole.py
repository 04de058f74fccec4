"""Divergences from a teacher inside a policy objective: distances, weights in closed form, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.audit.test_policy_demonstrations import make_step
from thence.audit.policy.objective import PolicyObjective
from thence.audit.policy.predict import beside_weights, token_weights
from thence.audit.policy.whole import measure_of
from thence.errors import UserError

P, T = (0.5, 0.3, 0.2), (0.2, 0.3, 0.5)
TAUGHT = {"own": "teacher", "surrogate": "weight", "clip_low": None, "clip_high": 1.0, "scale": "none"}


def kl(p, t):
    return sum(a * math.log(a / b) for a, b in zip(p, t, strict=True))


M = [0.7 * a + 0.3 * b for a, b in zip(P, T, strict=True)]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"divergence": "reverse"}, kl(P, T)),
        ({"divergence": "forward"}, kl(T, P)),
        ({"divergence": "jsd", "mixture": 0.3}, 0.7 * kl(P, M) + 0.3 * kl(T, M)),
        ({"divergence": "forward", "likeliest": 2}, kl((0.4, 0.6), (0.625, 0.375))),
        ({"divergence": "forward", "likeliest": 1, "tail": True}, kl((0.2, 0.8), (0.5, 0.5))),
        ({"divergence": "reverse", "likeliest": 3, "tail": True}, kl(P, T)),
    ],
)
def test_distances_are_those_of_the_formulas(said, expected):
    own, theirs = (torch.tensor([x], dtype=torch.float64).log() for x in (P, T))
    assert measure_of(PolicyObjective.of(TAUGHT | said))(own, theirs).item() == pytest.approx(expected)


def test_an_exact_kl_keeps_its_direction():
    own, theirs = (torch.tensor([x], dtype=torch.float64).log() for x in (P, T))
    for estimator, expected in (("full", kl(P, T)), ("full-forward", kl(T, P))):
        measure = measure_of(PolicyObjective.of({"kl": 0.1, "estimator": estimator}))
        assert measure(own, theirs).item() == pytest.approx(expected)


def test_a_divergence_weighs_what_a_teacher_reads_by_the_held_ratio_and_no_token_by_itself():
    step = make_step()
    taught = [
        replace(r, demonstration=False, teacher_prompt=(5, 6) if i % 2 else ()) for i, r in enumerate(step.rollouts)
    ]
    step = replace(step, rollouts=tuple(taught))
    asked = PolicyObjective.of(TAUGHT | {"divergence": "forward", "clip_high": 0.1, "normaliser": "sequence-mean"})
    assert not token_weights(step, asked).any()
    entropy, exact = beside_weights(step, asked)
    assert not entropy.any()
    lengths = np.bincount(step.row)
    ratio = np.minimum(np.exp(step.logp - step.old), 1.1)
    expected = np.where(step.row % 2 == 1, ratio / lengths[step.row] / len(lengths), 0.0)
    assert np.allclose(exact, expected)
    assert (np.exp(step.logp - step.old) > 1.1).any()


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"divergence": "reverse"}, "divergence"),
        ({"divergence": "reverse", "own": "teacher", "kl": 0.1, "estimator": "full"}, "divergence"),
        ({"divergence": "jsd", "own": "teacher", "mixture": 1.0}, "mixture"),
        ({"divergence": "renyi", "own": "teacher"}, "divergence"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_its_field(said, field):
    with pytest.raises(UserError) as refused:
        PolicyObjective.of(said)
    assert refused.value.field == field and refused.value.remedy

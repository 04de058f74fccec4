"""Prefixes, replays, correctness, smooth ratios inside a policy objective: weights in closed form against autograd."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.audit.test_policy_demonstrations import make_step
from thence.audit.policy.facts import PolicyStep
from thence.audit.policy.objective import PolicyObjective
from thence.audit.policy.predict import (
    MOST_SENSITIVE,
    beside_weights,
    edges,
    row_advantages,
    sensitivity,
    token_weights,
)
from thence.audit.solve.observation import ForwardRow
from thence.audit.solve.sequences import KnownExample, find_pieces

RAW = {"scale": "none", "clip_low": None, "clip_high": None}


def with_facts(**facts) -> PolicyStep:
    """The step with facts of its last row, and with entropies."""
    step = make_step()
    last = replace(step.rollouts[3], demonstration=False, **facts)
    entropy = np.random.default_rng(1).uniform(0.5, 3.0, len(step.row))
    return replace(step, rollouts=(*step.rollouts[:3], last), entropy=entropy, sampler=step.old + 0.3)


def srft(logp, step, advantage):
    h = torch.tensor([step.entropy[step.row == i].mean() for i in range(4)])[torch.tensor(step.row)]
    shown = torch.tensor(step.row == 3)
    right = torch.tensor(step.rewards()[step.row] >= 1)
    expert = 0.5 * torch.exp(-h) * logp + advantage * logp.exp() / (logp.exp() + 0.1)
    own = torch.where(right, 0.1 * torch.exp(h) * logp, -logp)
    return torch.where(shown, expert, own).sum() / len(logp)


def exgrpo(logp, step, advantage):
    replayed = (logp - torch.tensor(step.sampler)).exp()
    own = (logp - torch.tensor(step.old)).exp()
    return (advantage * torch.where(torch.tensor(step.row == 3), replayed / (replayed + 0.1), own)).sum() / len(logp)


def uft(logp, step, advantage):
    begun = torch.tensor(step.begun())
    own = advantage * (logp - torch.tensor(step.old)).exp()
    return torch.where(begun, 0.0, own).sum() / len(logp) + 0.3 * logp[begun].mean()


def prefix_rft(logp, step, advantage):
    begun = np.flatnonzero(step.begun())
    left_out = begun[np.argsort(step.entropy[begun])[:1]]  # floor(0.5 * 2)
    mask = torch.ones(len(logp)).index_fill(0, torch.tensor(left_out), 0.0)
    return (mask * advantage * (logp - torch.tensor(step.old)).exp()).sum() / len(logp)


def trapo(logp, step, advantage):
    begun = torch.tensor(step.begun())
    own = advantage * (logp - torch.tensor(step.old)).exp()
    p = logp.exp()
    bounded = torch.where(p >= 0.3, logp, p / 0.3 - 1 + np.log(0.3))
    assert (p[begun] < 0.3).any() and (p[begun] > 0.3).any()
    return torch.where(begun, 0.5 * bounded, own).sum() / len(logp)


def trapo_repeated(logp, step, advantage):
    own = advantage * (logp - torch.tensor(step.old)).exp()
    return torch.where(torch.tensor(step.begun()), 0.0, own).sum() / len(logp)


def sapo(logp, step, advantage):
    ratio = (logp - torch.tensor(step.old)).exp()
    tau = torch.where(advantage > 0, 1.0, 1.05)
    return (torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantage).sum() / len(logp)


def vespo(logp, step, advantage):
    row = torch.tensor(step.row)
    w = torch.zeros(4, dtype=logp.dtype).index_add(0, row, logp - torch.tensor(step.old)).exp()[row].detach()
    k, decay = torch.where(advantage >= 0, 2.0, 3.0), torch.where(advantage >= 0, 3.0, 2.0)
    return (torch.exp(decay) * w**k * torch.exp(-decay * w) * advantage * logp).sum() / len(logp)


FORMULAS = {
    "srft": (
        {"ratio": "none", "own": "correctness", "demonstration": "shape", "demonstration_advantage": True,
         "demonstration_likelihood": 0.5, "confidence": "sequence"},
        {"demonstration": True}, srft,
    ),
    "exgrpo": ({}, {"replay": True}, exgrpo),
    "uft": ({"prefix": "likelihood", "prefix_weight": 0.3}, {"prefix": 2}, uft),
    "prefix_rft": ({"prefix": "kept", "prefix_keep": 0.5}, {"prefix": 2}, prefix_rft),
    "trapo": ({"prefix": "bounded", "prefix_bound": 0.3, "prefix_weight": 0.5}, {"prefix": 3}, trapo),
    "trapo, a repeated prefix": ({"prefix": "bounded"}, {"prefix": 2, "repeated": True}, trapo_repeated),
    "sapo": ({"surrogate": "sigmoid"}, {}, sapo),
    "vespo": ({"surrogate": "gamma"}, {}, vespo),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_weights_are_the_derivative_of_the_formula(name):
    said, facts, formula = FORMULAS[name]
    facts = dict(facts)
    step = with_facts(**{k: v for k, v in facts.items() if k != "demonstration"})
    if facts.get("demonstration"):
        step = replace(step, rollouts=make_step().rollouts)
    asked = PolicyObjective.of(RAW | said)
    advantage = torch.tensor(row_advantages(step, asked))[torch.tensor(step.row)]
    logp = torch.tensor(step.logp, requires_grad=True)
    (expected,) = torch.autograd.grad(formula(logp, step, advantage), logp)
    assert np.allclose(token_weights(step, asked), expected.numpy(), rtol=1e-10)


def test_the_entropy_bonus_may_leave_prefixes_out():
    step = with_facts(prefix=2)
    tokens, begun = len(step.row), step.begun()
    for on, expected in (
        ("all", np.full(tokens, 1 / tokens)),
        ("own", ~begun / tokens),
        ("own-mean", ~begun / (tokens - 2)),
    ):
        asked = PolicyObjective.of({"entropy": 0.2, "entropy_on": on})
        assert np.allclose(beside_weights(step, asked)[0], -0.2 * expected)


def test_demonstrations_may_have_a_divisor_of_their_own():
    step, said = make_step(), RAW | {"demonstration_weight": 0.3, "ratio": "none"}
    tokens, shown = len(step.row), step.row == 3
    for divisor, own, others in (("all", tokens, tokens), ("own", 3, tokens), ("each", 3, tokens - 3)):
        asked = PolicyObjective.of(said | {"demonstration_divisor": divisor})
        weights = token_weights(step, asked)
        assert np.allclose(weights[shown], 0.3 / own)
        assert np.allclose(weights[~shown] * others, row_advantages(step, asked)[step.row][~shown])


def test_a_prefix_token_at_the_edge_of_its_share_may_have_any_weight():
    step = with_facts(prefix=2)
    asked = PolicyObjective.of(RAW | {"prefix": "kept", "prefix_keep": 0.5})
    assert not edges(step, asked, 1e-4).any()
    level = np.where(step.begun(), 1.0, step.entropy)
    assert (edges(replace(step, entropy=level), asked, 1e-4) == step.begun()).all()


def test_only_the_gamma_function_makes_weights_sensitive_and_never_without_bound():
    step = with_facts()
    gamma = PolicyObjective.of(RAW | {"surrogate": "gamma"})
    assert sensitivity(step, PolicyObjective.of(RAW)) == 1
    assert sensitivity(replace(step, old=step.logp), gamma) == 1  # w is one, and k - l is minus or plus one
    far = replace(step, old=step.logp - 0.5)
    assert 2 < sensitivity(far, gamma) < MOST_SENSITIVE
    assert sensitivity(replace(step, old=step.logp - 2.0), gamma) <= MOST_SENSITIVE


def test_a_response_that_the_mask_leaves_out_is_found_where_it_was_to_be_masked():
    known = [KnownExample((5, 6), (7, 8, 9), (1, 5, 6, 2, 7, 8, 9, 3), (-100,) * 4 + (7, 8, 9, 3))]
    row = ForwardRow((0, 1, 5, 6, 2, 7, 8, 9, 0, 0), (0, 1, 1, 1, 1, 0, 0, 0, 0, 0), None, 0, 0)
    assert find_pieces([row], known, 3) == ([], 1)
    ((piece,), strange) = find_pieces([row], known, 3, hidden=True)
    assert (strange, piece.ids) == (0, (1, 5, 6, 2, 7, 8, 9))
    assert piece.roles == (*["prompt"] * 4, "first", "body", "body")

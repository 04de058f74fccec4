"""LUFFY, SRFT and their baselines: published numbers, gradients against the formulas written out, and whole runs."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.methods.luffy_cases import METHODS
from tests.oracle import weights_of
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import RecipeError
from thence.methods.base import TokenFacts, make_batch
from thence.methods.luffy import Luffy
from thence.methods.mixed_policy import MixedPolicy
from thence.methods.on_policy import OnPolicy
from thence.methods.rl_sft_loss import RlSftLoss
from thence.methods.srft import Srft
from thence.objective import Clip, Context, Ratio, divisors, local_counts


def group(right: int, wrong: int, demo: float | None, index: int = 0, length: int = 3) -> list[Trajectory]:
    """So many right and wrong rollouts, and a demonstration of this score."""
    owner = Prompt(index, (2, 3), demonstration_ids=None if demo is None else tuple(range(5, 5 + length)))
    ids = tuple(range(4, 4 + length))
    found = [Trajectory(owner, ids, score=score) for score in [1.0] * right + [0.0] * wrong]
    return found if demo is None else [*found, Trajectory(owner, ids, origin="demonstration", score=demo)]


def known(trajectories: list[Trajectory], entropy: float = 0.5) -> list[TokenFacts]:
    """The same entropy at every token."""
    sizes = [len(t.response_ids) for t in trajectories]
    return [TokenFacts(torch.full((n,), -1.0), torch.full((n,), entropy)) for n in sizes]


@pytest.mark.parametrize("method", [Luffy, MixedPolicy])
@pytest.mark.parametrize(
    ("right", "demo", "std", "on_right", "on_wrong", "off"),
    [
        (0, 1.0, False, None, -0.125, 0.875),
        (3, 1.0, False, 0.5, -0.5, 0.5),
        (7, 1.0, False, 0, None, 0),
        (0, 0.0, False, None, 0, 0),
        (3, 0.0, False, 0.625, -0.375, -0.375),
        (0, 1.0, True, None, -0.353552, 2.474867),
    ],
)
def test_own_and_expert_tokens_share_their_groups_advantage(method, right, demo, std, on_right, on_wrong, off):
    trajectories = [*group(right, 7 - right, demo), *group(2, 0, 1.0, index=1)]
    weights = weights_of(method({"std": std, "entropy": 0.01}), trajectories)
    expected = [on_right] * right + [on_wrong] * (7 - right)
    for weight, advantage in zip(weights[:7], expected, strict=True):
        assert weight.tolist() == [pytest.approx([row] * 3, abs=1e-6) for row in (advantage, 0, 0.01)]
    assert weights[7].tolist() == [pytest.approx([row] * 3, abs=1e-6) for row in (0, off, 0.01)]
    assert not any(weight[:2].any() for weight in weights[8:])


@pytest.mark.parametrize("demo", [0.0, 1.0])
def test_rl_with_sft_loss_compares_own_responses_with_each_other_alone(demo):
    weights = weights_of(RlSftLoss({"entropy": 0.0}), group(3, 4, demo))
    assert [w.tolist() for w in weights[:3]] == [[pytest.approx([0.571429] * 3, abs=1e-6), [0.0] * 3]] * 3
    assert [w.tolist() for w in weights[3:7]] == [[pytest.approx([-0.428571] * 3, abs=1e-6), [0.0] * 3]] * 4
    assert weights[7].tolist() == [[0.0] * 3, [1.0] * 3]


@pytest.mark.parametrize(("entropy", "sft", "right"), [(0.5, 0.303265, 0.164872), (0.0, 0.5, 0.1)])
def test_srft_weighs_by_entropy_and_gives_an_advantage_to_the_demonstration_alone(entropy, sft, right):
    trajectories = group(3, 4, 1.0)
    weights = weights_of(Srft({"entropy": 0.0}), trajectories, known(trajectories, entropy))
    for i, weight in enumerate(weights):
        rows = (0, 0.5, sft) if i == 7 else (right if i < 3 else -1, 0, 0)
        assert weight.tolist() == [pytest.approx([row] * 3, abs=1e-6) for row in rows]


@pytest.mark.parametrize(
    ("pi", "value", "slope"),
    [(1e-4, 0.000999, 0.000998), (0.01, 0.090909, 0.082645), (0.1, 0.5, 0.25), (1, 0.909091, 0.082645)],
)
def test_expert_tokens_are_shaped_as_published(pi, value, slope):
    logp, context = torch.tensor([math.log(pi)]), Context(torch.ones(1))
    for method in (Luffy(), Srft()):
        surrogate = method.terms[1].surrogate
        assert surrogate.value(logp, context).item() == pytest.approx(value, abs=1e-6)
        assert surrogate.slope(logp, context).item() == pytest.approx(slope, abs=1e-6)
    for method in (MixedPolicy(), Srft({"demonstration": "probability"})):
        assert method.terms[1].surrogate.slope(logp, context).item() == pytest.approx(pi)


@pytest.mark.parametrize(
    ("method", "surrogate"),
    [
        (Luffy(), Ratio()),
        (Luffy({"clip": True}), Clip(0.2, pytest.approx(0.2))),  # type: ignore[arg-type]
        (Luffy({"clip": True, "clip_upper": 10}), Clip(0.2, 9.0)),
        (MixedPolicy(), Ratio()),
        (OnPolicy(), Clip(0.2, 0.2)),
        (OnPolicy({"clip": False}), Ratio()),
        (RlSftLoss(), Ratio()),
    ],
)
def test_only_the_on_policy_baseline_is_clipped_unless_asked_for(method, surrogate):
    assert method.terms[0].surrogate == surrogate


@pytest.mark.parametrize("preset", ["clean", "code", "paper"])
@pytest.mark.parametrize("method", METHODS)
def test_normaliser_presets(method, preset):
    made = method({"normaliser": preset})
    trajectories = [*group(1, 2, 1.0, 0, length=5), *group(1, 2, 1.0, 1, length=2)]
    if method is OnPolicy:
        trajectories = [replace(t, origin="rollout") for t in trajectories]
    found = divisors(made.terms, local_counts(make_batch(made, trajectories, known(trajectories))))
    tokens, expert = 4 * 5 + 4 * 2, 5 + 2
    policy, likelihood = (8 * 8192, expert) if preset == "code" else (tokens, tokens)
    assert dict(zip([term.name for term in made.terms], found, strict=True)) == {
        term.name: {"likelihood": likelihood, "entropy": tokens}.get(term.name, policy) for term in made.terms
    }


def test_srft_takes_entropy_of_a_sequence_a_token_or_the_batch():
    trajectories = [*group(1, 1, 1.0), *group(1, 0, 1.0, index=1, length=2)]
    entropies = [torch.arange(len(t.response_ids)) + i * 0.25 for i, t in enumerate(trajectories)]
    facts = [TokenFacts(-e, e) for e in entropies]
    batch = float(torch.cat(entropies).mean())
    for level, expected in {
        "sequence": [e.mean().expand(len(e)) for e in entropies],
        "token": entropies,
        "batch": [torch.full_like(e, batch) for e in entropies],
    }.items():
        for sign in (-1, 1):
            weights = weights_of(Srft({"entropy_level": level, "sft_entropy_sign": sign}), trajectories, facts)
            for weight, trajectory, entropy in zip(weights, trajectories, expected, strict=True):
                if trajectory.origin == "demonstration":
                    torch.testing.assert_close(weight[2], 0.5 * (sign * entropy).exp().double())
                elif trajectory.score:
                    torch.testing.assert_close(weight[0], 0.1 * entropy.exp().double())
                else:
                    assert weight[0].tolist() == [-1.0] * len(entropy)


def test_entropy_of_the_batch_is_that_of_all_ranks():
    whole = [*group(1, 1, 1.0), *group(0, 2, 1.0, index=1, length=2)]
    facts = [replace(f, entropy=f.entropy.double() + i / 19) for i, f in enumerate(known(whole))]
    expected = weights_of(Srft({"entropy_level": "batch"}), whole, facts)
    told: list[int] = []
    for part in (slice(0, 3), slice(3, 6)):  # each rank says its sums
        method = Srft({"entropy_level": "batch"})
        method.sampler = SimpleNamespace(total=lambda count: (told.append(count), count)[1])  # type: ignore
        method.weigh(whole[part], facts[part])
    for part in (slice(0, 3), slice(3, 6)):
        sums = iter([told[0] + told[2], told[1] + told[3]])
        method = Srft({"entropy_level": "batch"})
        method.sampler = SimpleNamespace(total=lambda count, sums=sums: next(sums))  # type: ignore
        for got, weight in zip(weights_of(method, whole[part], facts[part]), expected[part], strict=True):
            assert torch.equal(got, weight)  # bit by bit: no rank rounds its own sum


@pytest.mark.parametrize("method", METHODS)
def test_responses_without_tokens_and_ranks_without_responses_are_no_trouble(method):
    trajectories = [*group(1, 1, 1.0), *group(1, 0, 0.0, index=1, length=0)]
    for options in ({}, {"entropy": 0.0}):
        made = method(options)
        weights = weights_of(made, trajectories, known(trajectories))
        assert [tuple(w.shape) for w in weights] == [(len(made.terms), n) for n in (3, 3, 3, 0, 0)]
        assert made.weigh([], []) == []


class FakeSampler:
    """Every odd prompt has a demonstration."""

    def next_prompts(self, count):
        return [Prompt(i, (2, 3), demonstration_ids=(9, 1) if i % 2 else None) for i in range(count)]

    def rollouts(self, prompts, n):
        return [Trajectory(prompt, (4, 5, j), score=0.0) for prompt in prompts for j in range(n)]

    def demonstrations(self, prompts):
        assert all(prompt.demonstration_ids for prompt in prompts)
        return [Trajectory(p, p.demonstration_ids, origin="demonstration", score=1.0) for p in prompts]


@pytest.mark.parametrize("method", [Luffy, MixedPolicy, RlSftLoss, Srft])
def test_a_demonstration_takes_a_place_in_its_group_and_a_rollout_where_there_is_none(method):
    found = method().compose(FakeSampler(), 4, 3)
    assert [t.prompt.index for t in found] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert [t.origin == "demonstration" for t in found] == [False] * 5 + [True] + [False] * 5 + [True]
    assert [t.response_ids for t in found[:6]] == [(4, 5, 0), (4, 5, 1), (4, 5, 2), (4, 5, 0), (4, 5, 1), (9, 1)]
    assert len(method().compose(FakeSampler(), 1, 2)) == 2
    with pytest.raises(RecipeError, match="learns nothing from 1 rollout"):
        method().prepare(1, 8)


def test_the_on_policy_baseline_leaves_demonstrations_alone():
    sampler: Any = FakeSampler()
    found = OnPolicy().compose(sampler, 2, 3)
    assert [t.origin for t in found] == ["rollout"] * 6

"""Methods that choose between rewards and demonstrations: ReLIFT, HPT, SuperRL, SASR."""

from __future__ import annotations

import json

import pytest

from tests.methods.gates_cases import FakeSampler, kinds, right
from tests.oracle import weights_of
from thence.methods.hpt import Hpt
from thence.methods.relift import Relift, UnsolvedPrompt
from thence.methods.sasr import Sasr, chance
from thence.methods.superrl import SuperRl


@pytest.mark.parametrize(
    ("gate", "correct", "demonstrated"),
    [(0.0, 0, True), (0.0, 1, False), (0.0, 8, False), (0.25, 0, True), (0.25, 2, True), (0.25, 3, False)],
)
def test_hpt_gate_golden_vectors(gate, correct, demonstrated):
    sampler = FakeSampler({0: right(correct)})
    found = Hpt({"gate": gate}).compose(sampler, 1, 8)
    assert kinds(found) == ([(0, "demonstration")] if demonstrated else [(0, "rollout")] * 8)


def test_hpt_replaces_the_groups_of_failed_prompts_in_their_places():
    sampler = FakeSampler({0: right(0, 3), 1: right(1, 3), 2: right(0, 3), 3: right(0, 3)}, bare=(3,))
    found = Hpt().compose(sampler, 4, 3)
    rollouts = [[(i, "rollout")] * 3 for i in range(4)]
    assert kinds(found) == [(0, "demonstration"), *rollouts[1], (2, "demonstration"), *rollouts[3]]
    assert found[0].response_ids == sampler.prompt(0).demonstration_ids


@pytest.mark.parametrize(("gate", "all_right"), [("hard", "rollout"), ("advantage", "demonstration")])
def test_superrl_gates_differ_on_groups_that_are_all_right(gate, all_right):
    sampler = FakeSampler({0: right(0, 4), 1: right(1, 4), 2: right(4, 4)})
    found = kinds(SuperRl({"gate": gate}).compose(sampler, 3, 4))
    assert found[:5] == [(0, "demonstration")] + [(1, "rollout")] * 4
    assert {kind for index, kind in found if index == 2} == {all_right}


def test_hpt_weights_are_advantages_or_the_coefficient():
    trajectories = Hpt({"gate": 0.25}).compose(FakeSampler({0: right(2), 1: right(4)}), 2, 8)
    weights = weights_of(Hpt({"coefficient": 0.3}), trajectories)
    assert [w[:, 0].tolist() for w in weights] == [
        [0.0, 0.3, 0.001],
        *[[0.5, 0.0, 0.001]] * 4,
        *[[-0.5, 0.0, 0.001]] * 4,
    ]
    assert all(
        w.eq(w[:, :1]).all() and w.shape[1] == len(t.response_ids) for t, w in zip(trajectories, weights, strict=True)
    )


def test_a_demonstration_does_not_count_in_the_group_of_the_same_prompt():
    """With few prompts, a batch can hold one twice."""
    sampler = FakeSampler({0: right(1, 4)})
    rollouts = sampler.rollouts([sampler.prompt(0)], 4)
    (shown,) = sampler.demonstrations([sampler.prompt(0)])
    weights = weights_of(Hpt({"entropy": 0}), [*rollouts, shown])
    assert [w[:, 0].tolist() for w in weights] == [[0.75, 0.0], *[[-0.25, 0.0]] * 3, [0.0, 1.0]]


# ReLIFT's buffer.


def entries(method: Relift) -> list[int]:
    return [failure.prompt.index for failure in method.buffer]


def test_relift_buffer_golden_vector():
    method = Relift({"sft_batch": 3})
    sampler = FakeSampler({1: right(1, 2), 5: right(2, 2)})
    assert len(method.compose(sampler, 2, 2)) == 4  # prompts 0, 1: every rollout stays in the RL step
    assert entries(method) == [0]
    assert method.side_steps(sampler) == []
    sampler.step = 1
    method.compose(sampler, 2, 2)  # prompts 2, 3
    assert entries(method) == [2, 3, 0]
    sampler.step = 2
    method.compose(sampler, 2, 2)  # prompts 4, 5
    assert entries(method) == [4, 2, 3, 0]
    (step,) = method.side_steps(sampler)
    assert kinds(list(step.trajectories)) == [(i, "demonstration") for i in (4, 2, 3)]
    assert (step.name, step.lr, step.clip_norm) == ("sft", None, 1.0)
    assert entries(method) == [0]
    assert method.side_steps(sampler) == []


@pytest.mark.parametrize(("held", "taken"), [(127, 0), (128, 128), (300, 128)])
def test_relift_takes_one_batch_of_128_at_most(held, taken):
    method, sampler = Relift(), FakeSampler({})
    method.buffer = [UnsolvedPrompt(0, sampler.prompt(i)) for i in range(held)]
    steps = method.side_steps(sampler)
    assert [kinds(list(s.trajectories)) for s in steps] == [[(i, "demonstration") for i in range(128)]][: taken // 128]
    assert entries(method) == list(range(taken, held))


def test_relift_skips_prompts_without_demonstration():
    method = Relift()
    method.compose(FakeSampler({}, bare=(1,)), 3, 2)
    assert entries(method) == [0, 2]


def test_relift_step_settings_are_those_of_its_options():
    sampler = FakeSampler({})
    method = Relift({"sft_batch": 1, "sft_lr": 3e-6, "sft_clip_norm": 0.5, "sft_entropy": 0})
    method.compose(sampler, 1, 2)
    (step,) = method.side_steps(sampler)
    assert (step.lr, step.clip_norm, [t.name for t in step.terms]) == (3e-6, 0.5, ["sft"])


# SASR's coin.


@pytest.mark.parametrize(
    ("last", "warm", "gamma", "p"), [(2, 2, 1, 0.5), (1, 2, 1, 1 / 3), (2, 2, 3, 0.25), (1, 2, 0, 1.0), (0, 0, 1, 0.0)]
)
def test_sasr_chance_golden_vectors(last, warm, gamma, p):
    assert chance(last, warm, gamma) == pytest.approx(p)


def sasr_step(method: Sasr, sampler: FakeSampler, norm: float) -> str:
    """What kind of step a rollout batch was; its gradient norm is told the method."""
    found = method.compose(sampler, 3, 2)
    side = method.side_steps(sampler)
    assert [len(s.trajectories) for s in side] == ([] if found else [3])
    method.took_step("main" if found else "sft", norm)
    sampler.step += 1
    return "rl" if found else "sft"


def test_sasr_warms_up_and_then_lets_the_coin_follow_the_sft_gradient():
    method, sampler = Sasr({"warmup_steps": 2}), FakeSampler({}, luck=0.99)
    assert [sasr_step(method, sampler, norm) for norm in (9.0, 4.0)] == ["sft", "sft"]
    assert (method.g_warm, method.g_last) == (4.0, 4.0)
    sampler.luck = 0.49  # p = 4 / (4 + 4)
    assert sasr_step(method, sampler, 1.0) == "sft"
    assert (method.g_warm, method.g_last) == (4.0, 1.0)
    sampler.luck = 0.2  # p = 1 / (1 + 4), not below it
    assert sasr_step(method, sampler, 7.0) == "rl"
    assert (method.g_warm, method.g_last) == (4.0, 1.0)
    sampler.luck = 0.19
    assert sasr_step(method, sampler, 6.0) == "sft"
    assert sampler.expert_drawn == 4 * 3
    assert sampler.drawn == 3  # nothing is drawn for an SFT step


def test_relift_goes_on_from_its_saved_state():
    sampler = FakeSampler({})
    method, resumed = Relift({"sft_batch": 2}), Relift({"sft_batch": 2})
    method.compose(sampler, 3, 2)
    resumed.restore(json.loads(json.dumps(method.state())))
    (a,), (b,) = method.side_steps(sampler), resumed.side_steps(sampler)
    assert [(t.prompt.token_ids, t.response_ids) for t in a.trajectories] == [
        (t.prompt.token_ids, t.response_ids) for t in b.trajectories
    ]
    assert resumed.state() == method.state() != Relift().state()


def test_sasr_goes_on_from_its_saved_state():
    method, sampler = Sasr({"warmup_steps": 2}), FakeSampler({}, luck=0.3)
    for norm in (1.7, 1 / 3, 0.1):
        sasr_step(method, sampler, norm)
    resumed = Sasr({"warmup_steps": 2})
    resumed.restore(json.loads(json.dumps(method.state())))
    assert vars(resumed) == vars(method)
    assert (resumed.warmed, resumed.g_warm, resumed.g_last) == (2, 1 / 3, 0.1)


@pytest.mark.parametrize(
    ("method", "surrogates", "published"),
    [
        (Relift(), ["Ratio", "Entropy"], {"std": False, "entropy": 0.001, "sft_batch": 128, "sft_entropy": 0.001}),
        (Hpt(), ["Ratio", "Logp", "Entropy"], {"std": False, "entropy": 0.001, "gate": 0.0, "coefficient": 1.0}),
        (SuperRl(), ["Clip", "Logp"], {"std": True, "entropy": 0.0, "clip_low": 0.2, "clip_high": 0.2}),
        (Sasr(), ["Clip"], {"std": True, "entropy": 0.0, "clip_low": 0.2, "clip_high": 0.2, "kl": 0.0}),
    ],
)
def test_defaults_are_the_published_settings(method, surrogates, published):
    assert [type(term.surrogate).__name__ for term in method.terms] == surrogates
    assert {name: getattr(method.options, name) for name in published} == published
    assert {term.normaliser.of for term in method.terms} == {"tokens"}  # the clean preset

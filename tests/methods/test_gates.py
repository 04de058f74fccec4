"""Methods that choose between rewards and demonstrations: ReLIFT, HPT, SuperRL, SASR."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.oracle import gradient, relative, row_statistics, weights_of
from tests.recipes import world_recipe
from thence.data.trajectory import Prompt, Trajectory
from thence.methods import registry
from thence.methods.base import Method, SideStep, make_batch, make_rows
from thence.methods.hpt import Hpt
from thence.methods.relift import Failure, Relift
from thence.methods.sasr import Sasr, chance
from thence.methods.superrl import SuperRl
from thence.objective import Batch, local_counts
from thence.pipeline.progress import NullWatcher
from thence.pipeline.run import run
from thence.train.step import StepSettings, accumulate_gradients
from thence.train.trainer import Trainer

OWN = (Relift, Hpt, SuperRl, Sasr)
WAYS = [(10**6, False), (30, False), (30, True), (1, True)]  # tokens of a micro-batch, packing


class FakeSampler:
    """Prompts 0, 1, 2, ... with demonstrations; the scores of a prompt's group are looked up, 0 where there are none.

    Responses are random tokens of random lengths. ``luck`` is what every coin shows.
    """

    def __init__(self, scores: dict[int, list[float]], bare: tuple[int, ...] = (), luck: float = 0.5):
        self.scores, self.bare, self.luck = scores, bare, luck
        self.step, self.steps, self.drawn, self.expert_drawn = 0, 100, 0, 0
        self.rank, self.world = 0, 1

    def prompt(self, index: int) -> Prompt:
        rng = random.Random(index)
        ids = [rng.randrange(40) for _ in range(rng.randint(2, 4))]
        shown = tuple(rng.randrange(40) for _ in range(rng.randint(3, 12)))
        return Prompt(index, tuple(ids), None if index in self.bare else shown)

    def next_prompts(self, count):
        self.drawn += count
        return [self.prompt(self.drawn - count + i) for i in range(count)]

    def expert_prompts(self, count):
        self.expert_drawn += count
        return [self.prompt(self.expert_drawn - count + i) for i in range(count)]

    def rollouts(self, prompts, n: int):
        rng = random.Random(7)
        return [
            Trajectory(p, tuple(rng.randrange(40) for _ in range(rng.randint(1, 10))), score=score)
            for p in prompts
            for score in self.scores.get(p.index, [0.0] * n)
        ]

    def continuations(self, prompts, prefixes, n):
        raise NotImplementedError

    def demonstrations(self, prompts):
        return [Trajectory(p, p.demonstration_ids or (), origin="demonstration", score=1.0) for p in prompts]

    def uniform(self, *key):
        return self.luck

    def total(self, count):
        return count

    def gather(self, value):
        return [value]


def kinds(trajectories: list[Trajectory]) -> list[tuple[int, str]]:
    return [(t.prompt.index, t.origin) for t in trajectories]


def right(k: int, n: int = 8) -> list[float]:
    return [1.0] * k + [0.0] * (n - k)


# Gates.


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
    method.buffer = [Failure(0, sampler.prompt(i)) for i in range(held)]
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


# State.


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


# Settings that the formulas leave open.


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


# Gradients against the formulas written out.


def centred(trajectories: list[Trajectory], i: int, std: bool) -> float:
    group = [t.score or 0.0 for t in trajectories if t.prompt.index == trajectories[i].prompt.index]
    scores = torch.tensor(group, dtype=torch.float64)
    advantage = (trajectories[i].score or 0.0) - scores.mean()
    return float(advantage / (scores.std() + 1e-6) if std else advantage)


def tokens_of(trajectories: list[Trajectory], kind: str | None = None) -> int:
    return sum(len(t.response_ids) for t in trajectories if kind in (None, t.origin))


def written_out(model: Any, method: Method, rows: list[Trajectory], old: list[Tensor]) -> Tensor:
    """The loss of the printed formulas; 2 ranks, longest response 50 and 3 prompts for the presets that need them."""
    o, name = method.options, method.name
    group = max(sum(t.prompt.index == r.prompt.index for t in rows) for r in rows)
    n, n_sft = tokens_of(rows), tokens_of(rows, "demonstration")
    loss = torch.zeros((), dtype=torch.float64)
    for i, trajectory in enumerate(rows):
        logp, entropy = row_statistics(model, trajectory)
        length = len(logp)
        if trajectory.origin == "demonstration":
            divisor = {"clean": n, "code": n_sft, "paper": 3 * (length if name == "hpt" else 1)}[o.normaliser]
            loss = loss - getattr(o, "coefficient", 1.0) * logp.sum() / divisor
        else:
            ratio, advantage = (logp - old[i]).exp(), centred(rows, i, o.std)
            gain = ratio * advantage
            width = getattr(o, "clip", None) if name == "relift" else getattr(o, "clip_low", None)
            if width is not None:
                gain = torch.minimum(gain, ratio.clamp(1 - width, 1 + width) * advantage)
            if getattr(o, "kl", 0):
                gain = gain - o.kl * ((old[i] + 0.3 - logp).exp() - (old[i] + 0.3 - logp) - 1)
            paper = {
                "relift": n,
                "hpt": 3 * group * 50,
                "superrl": 3 * group * length,
                "sasr": len(rows) * length,
            }
            loss = loss - gain.sum() / {"clean": n, "code": 2 * 50, "paper": paper[name]}[o.normaliser]
        loss = loss - o.entropy * entropy.sum() / n
    return loss


def engine_gradient(model: Any, batch: Batch, budget: int, packing: bool) -> Tensor:
    settings = StepSettings(budget, packing, 0.0, torch.float64)
    accumulate_gradients(model, torch.optim.SGD(model.parameters(), lr=0.0), batch, local_counts(batch), settings)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def old_logps(model: Any, rows: list[Trajectory]) -> list[Tensor]:
    return [row_statistics(model, t)[0].detach() for t in rows]


PRESET = {"code_ranks": 2, "code_tokens": 50}
BY_PROMPT = PRESET | {"paper_prompts": 3}
VARIANTS: list[Method] = [
    *(Relift(PRESET | {"normaliser": name, "entropy": 0.1}) for name in ("clean", "code", "paper")),
    Relift({"clip": 0.2, "std": True}),
    *(Hpt(BY_PROMPT | {"normaliser": name, "coefficient": 0.3}) for name in ("clean", "code", "paper")),
    *(SuperRl(BY_PROMPT | {"normaliser": name}) for name in ("clean", "code", "paper")),
    SuperRl({"gate": "advantage", "entropy": 0.2}),
    *(Sasr(PRESET | {"normaliser": name}) for name in ("clean", "code", "paper")),
    Sasr({"kl": 0.4}),
]


def label(method: Method) -> str:
    return "-".join([method.name, *(f"{k}={v}" for k, v in method.options.model_dump(exclude_unset=True).items())])


@pytest.mark.parametrize("method", VARIANTS, ids=label)
def test_gradients_are_those_of_the_formula_before_and_after_the_policy_moved(tiny_model, method):
    model = tiny_model()
    scores = {0: right(1, 4), 1: right(0, 4), 2: right(3, 4)}
    made = type(method)(method.options.model_dump(exclude_unset=True))
    if isinstance(made, Sasr):
        made.warmed, made.g_warm, made.g_last = 20, 1.0, 0.1
    rows = made.compose(FakeSampler(scores), 3, 4)
    assert ((1, "demonstration") in kinds(rows)) == isinstance(made, Hpt | SuperRl)
    old = old_logps(model, rows)
    batch_rows = [replace(r, behaviour=b) for r, b in zip(make_batch(made, rows).rows, old, strict=True)]
    if getattr(made.options, "kl", 0):
        batch_rows = [replace(row, reference=logp + 0.3) for row, logp in zip(batch_rows, old, strict=True)]
    batch = Batch(made.terms, tuple(batch_rows))
    trainer = Trainer(model, 2e-2, StepSettings(64, compute_dtype=torch.float64))
    for _ in range(2):
        expected = gradient(model, written_out(model, made, rows, old))
        assert expected.norm() > 0
        for budget, packing in WAYS:
            assert relative(engine_gradient(model, batch, budget, packing), expected) <= 1e-12
        trainer.step(batch)
    moved = [(a - b).abs().max() for a, b in zip(old_logps(model, rows), old, strict=True)]
    assert max(moved) > 0.3  # beyond the clips


def side_step(method: Method, sampler: FakeSampler) -> SideStep:
    method.compose(sampler, 3, 2)
    (step,) = method.side_steps(sampler)
    return step


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    ("method", "alpha", "divisor"),
    [
        (Relift({"sft_batch": 3, "sft_entropy": 0.2}), 0.2, "tokens"),
        (Relift({"sft_batch": 3, "sft_entropy": 0.2, "normaliser": "code"}), 0.2, "tokens"),
        (Sasr(), 0.0, "tokens"),
        (Sasr({"normaliser": "paper"}), 0.0, "sequences"),
    ],
    ids=["relift", "relift code", "sasr", "sasr paper"],
)
def test_gradients_of_sft_steps_are_those_of_the_formula(tiny_model, method, alpha, divisor, packing):
    model = tiny_model()
    made = type(method)(method.options.model_dump(exclude_unset=True))
    step = side_step(made, FakeSampler({}))
    batch = Batch(step.terms, tuple(make_rows(step.terms, step.trajectories, step.weights)))
    stats = [row_statistics(model, t) for t in step.trajectories]
    size = tokens_of(list(step.trajectories)) if divisor == "tokens" else 3
    loss = torch.stack([(-logp - alpha * entropy).sum() for logp, entropy in stats]).sum() / size
    assert relative(engine_gradient(model, batch, 24, packing), gradient(model, loss)) <= 1e-12


# Whole runs.


class Killed(Exception):
    pass


class Kills(NullWatcher):
    """Ends the run when a step has been taken but not yet kept."""

    def __init__(self, step: int):
        self.last = step

    def step(self, facts: Any) -> None:
        if facts["step"] == self.last:
            raise Killed


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(registry, "OWN", (*registry.OWN, *OWN))
    # prompts whose text has an odd sum of characters are never solved
    value = "float(sum(map(ord, prompt)) % 2 == 0 and len(set(response)) % 2 == 0)"
    rl = {"steps": 4, "mini_batch": 2, "max_tokens": 12, "checkpoint_every": 2}
    return world_recipe(tmp_path, ["rl"], value, data={"limit": 20}, rl=rl)


def lines(folder: Path) -> list[dict[str, Any]]:
    untimed = ("seconds", "tokens_per_s", "sample_seconds", "train_seconds")
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in untimed} for line in found]


@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [
        ("relift", {"sft_batch": 3, "sft_lr": 5e-3}, 4),
        ("hpt", {"gate": 0.25}, 3),
        ("superrl", {"gate": "advantage"}, 3),
        ("sasr", {"warmup_steps": 1, "gamma": 1.0}, 6),
    ],
)
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(recipe, tmp_path, name, options, steps):
    recipe["rl"] |= {"method": name, "options": options, "steps": steps}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(recipe, {"folder": str(whole)})
    with pytest.raises(Killed):
        run(recipe, {"folder": str(broken)}, watcher=Kills(3))
    run(recipe, {"folder": str(broken)})
    assert lines(broken) == lines(whole)
    expected, got = (load_file(f / "stages" / "rl" / "model" / "model.safetensors") for f in (whole, broken))
    assert all(got[key].equal(expected[key]) for key in expected)
    sides = [line.get("side_steps", 0) for line in lines(whole)]
    kinds_trained = [set(line.get("shares", {"rollout": 1.0})) for line in lines(whole)]
    assert {"rollout", "demonstration"} <= set().union(*kinds_trained)
    if name == "relift":
        assert {0, 1} == set(sides) and sides[2:] != [0, 0]  # a step of either kind, one after the kill
    elif name == "sasr":
        assert sides[0] == 1 and {0, 1} == set(sides[1:])
        assert all((line["response_tokens"] > 0) == (side == 0) for line, side in zip(lines(whole), sides, strict=True))
    else:
        assert set(sides) == {0}

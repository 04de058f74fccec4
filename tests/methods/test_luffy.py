"""LUFFY, SRFT and their baselines: published numbers, gradients against the formulas written out, and whole runs."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.oracle import gradient, relative, row_statistics, weights_of
from tests.recipes import world_recipe
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import RecipeError, UserError
from thence.methods import registry
from thence.methods.base import TokenFacts, make_batch
from thence.methods.luffy import Luffy
from thence.methods.mixed_policy import MixedPolicy
from thence.methods.on_policy import OnPolicy
from thence.methods.rl_sft_loss import RlSftLoss
from thence.methods.srft import Srft
from thence.objective import Clip, Context, Ratio, divisors, local_counts
from thence.pipeline.rl_metrics import BatchMetrics
from thence.pipeline.rl_update import Update
from thence.pipeline.run import run
from thence.train.parallel import SingleProcess
from thence.train.step import StepSettings, accumulate_gradients, train_step
from thence.train.trainer import Trainer

METHODS = (Luffy, MixedPolicy, OnPolicy, RlSftLoss, Srft)
NAMES = [method.name for method in METHODS]


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


# Published numbers.


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


# Settings of SRFT.


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
    facts = [replace(f, entropy=f.entropy + i) for i, f in enumerate(known(whole))]
    expected = weights_of(Srft({"entropy_level": "batch"}), whole, facts)
    told: list[int] = []
    for part in (slice(0, 3), slice(3, 6)):  # each rank says its sums
        method = Srft({"entropy_level": "batch"})
        method._sampler = SimpleNamespace(total=lambda count: (told.append(count), count)[1])  # type: ignore
        method.weigh(whole[part], facts[part])
    for part in (slice(0, 3), slice(3, 6)):
        sums = iter([told[0] + told[2], told[1] + told[3]])
        method = Srft({"entropy_level": "batch"})
        method._sampler = SimpleNamespace(total=lambda count, sums=sums: next(sums))  # type: ignore
        for got, weight in zip(weights_of(method, whole[part], facts[part]), expected[part], strict=True):
            torch.testing.assert_close(got, weight, rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_responses_without_tokens_and_ranks_without_responses_are_no_trouble(method):
    trajectories = [*group(1, 1, 1.0), *group(1, 0, 0.0, index=1, length=0)]
    for options in ({}, {"entropy": 0.0}):
        made = method(options)
        weights = weights_of(made, trajectories, known(trajectories))
        assert [tuple(w.shape) for w in weights] == [(len(made.terms), n) for n in (3, 3, 3, 0, 0)]
        assert made.weigh([], []) == []


# What is sampled.


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
    with pytest.raises(RecipeError, match="no room"):
        method().compose(FakeSampler(), 4, 1)


def test_the_on_policy_baseline_leaves_demonstrations_alone():
    sampler: Any = FakeSampler()
    found = OnPolicy().compose(sampler, 2, 3)
    assert [t.origin for t in found] == ["rollout"] * 6


# Gradients against the formulas written out.


@dataclass(frozen=True)
class Variant:
    """A method with its settings."""

    method: Any
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.method.name, *map(str, self.options.values())])


CODE = {"normaliser": "code", "code_tokens": 11}
VARIANTS = [
    Variant(Luffy),
    Variant(Luffy, CODE | {"std": True, "gamma": 0.3, "entropy": 0.2}),
    Variant(Luffy, {"clip": True, "clip_upper": 1.3, "demonstration_weight": 2.5, "shaping": "logp"}),
    Variant(MixedPolicy),
    Variant(OnPolicy),
    Variant(OnPolicy, CODE | {"code_ranks": 2, "entropy": 0.0, "std": True}),
    Variant(RlSftLoss),
    Variant(RlSftLoss, CODE | {"coefficient": 0.7}),
    Variant(Srft),
    Variant(Srft, CODE | {"std": True, "sft_entropy_sign": 1, "entropy_level": "token"}),
    Variant(Srft, {"entropy_level": "batch", "demonstration": "probability", "own": "ratio"}),
    Variant(Srft, {"own": "probability", "entropy": 0.0}),
]


def make_trajectories(seed: int, experts: bool) -> list[Trajectory]:
    """Four groups of three rollouts and a demonstration, which is wrong in the second and missing in the third."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for index in range(4):
        prompt, *responses = (
            tuple(torch.randint(40, (int(n),), generator=generator).tolist())
            for n in torch.randint(1, 12, (5,), generator=generator)
        )
        demo = experts and index != 2
        owner = Prompt(index, prompt, demonstration_ids=responses[3] if demo else None)
        for j, (ids, score) in enumerate(zip(responses, [1.0, 0.0, float(index % 2), float(index != 1)], strict=True)):
            origin = "demonstration" if demo and j == 3 else "rollout"
            result.append(Trajectory(owner, ids, origin=origin, score=score))
    return result


def stated_loss(variant: Variant, model: Any, chosen: list[Trajectory], old: dict[int, torch.Tensor]) -> torch.Tensor:
    """The formula in plain words; ``old``: log-probabilities before the first optimizer step, by trajectory."""
    o = {"std": False, "entropy": 0.001, "normaliser": "clean", "code_tokens": 8192, "code_ranks": 8} | variant.options
    name = variant.method.name
    found = [row_statistics(model, t) for t in chosen]
    tokens = sum(len(t.response_ids) for t in chosen)
    expert_tokens = sum(len(t.response_ids) for t in chosen if t.origin == "demonstration")
    code = o["normaliser"] == "code"
    z, z_demo = (o["code_tokens"] * o["code_ranks"], expert_tokens) if code else (tokens, tokens)
    every = torch.cat([entropy.detach() for _, entropy in found])
    loss = -o["entropy"] * torch.cat([entropy for _, entropy in found]).sum() / tokens
    for trajectory, (logp, entropy) in zip(chosen, found, strict=True):
        expert = trajectory.origin == "demonstration"
        peers = [t for t in chosen if t.prompt.index == trajectory.prompt.index]
        if name == "rl_sft_loss":
            peers = [t for t in peers if t.origin != "demonstration"]
        scores = [t.score or 0.0 for t in peers]
        a = (trajectory.score or 0.0) - statistics.fmean(scores)
        if o["std"]:
            a /= statistics.stdev(scores) + 1e-6
        ratio = (logp - old[id(trajectory)]).exp()
        h = entropy.detach()
        h = {"token": h, "batch": every.mean()}.get(o.get("entropy_level", "sequence"), h.mean())
        shaped = logp.exp() / (logp.exp() + o.get("gamma", 0.1))
        if name == "rl_sft_loss" and expert:
            loss = loss - o.get("coefficient", 1.0) * logp.sum() / z_demo
        elif name == "srft" and expert:
            act = logp.exp() if o.get("demonstration") == "probability" else shaped
            loss = loss - a * act.sum() / z - 0.5 * ((o.get("sft_entropy_sign", -1) * h).exp() * logp).sum() / z_demo
        elif name == "srft":
            act = {"ratio": ratio, "probability": logp.exp()}.get(o.get("own", "logp"), logp)
            loss = loss - ((0.1 * h.exp() if trajectory.score == 1 else -1) * act).sum() / z
        elif expert:
            act = {"logp": logp}.get(o.get("shaping", ""), logp.exp() if name == "mixed_policy" else shaped)
            loss = loss - o.get("demonstration_weight", 1.0) * a * act.sum() / z
        elif o.get("clip", name == "on_policy"):
            held = ratio.clamp(0.8, max(1.2, o.get("clip_upper", 1.0)))
            loss = loss - torch.minimum(ratio * a, held * a).sum() / z
        else:
            loss = loss - a * ratio.sum() / z
    return loss


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradients_of_both_optimizer_steps_are_those_of_the_formula(tiny_model, variant):
    model, taken = tiny_model(), []

    def step_and_tell(model, optimizer, batch, *rest):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        report = train_step(model, optimizer, batch, *rest)
        taken.append((before, report, torch.cat([p.grad.flatten() for p in model.parameters()])))
        return report

    trajectories = make_trajectories(3, variant.method is not OnPolicy)
    old = {id(t): row_statistics(model, t)[0].detach() for t in trajectories}
    trainer = Trainer(model, 2e-2, StepSettings(64, True, 0.0, torch.float64), take_step=step_and_tell)
    stage: Any = SimpleNamespace(temperature=1.0, importance_bound=None)
    method = variant.method(variant.options)
    Update(stage, method, trainer, minis=2).take(trajectories, BatchMetrics(SingleProcess(), method.terms))
    assert len(taken) == 2
    for part, (before, report, got) in zip((slice(0, 8), slice(8, 16)), taken, strict=True):
        model.load_state_dict(before)
        loss = stated_loss(variant, model, trajectories[part], old)
        assert report.loss == pytest.approx(loss.item(), rel=1e-10, abs=1e-12)
        assert relative(got, gradient(model, loss)) <= 1e-10
    moved = torch.cat([row_statistics(model, t)[0].detach() - old[id(t)] for t in trajectories[8:]])
    assert moved.abs().max() > 0.3  # the policy of the second step is another
    assert (taken[1][1].clip_share > 0) == (variant.options.get("clip", variant.method is OnPolicy))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_gradient_does_not_depend_on_the_partition(tiny_model, variant):
    model, method = tiny_model(), variant.method(variant.options)
    trajectories = make_trajectories(4, variant.method is not OnPolicy)
    found = [tuple(x.detach() for x in row_statistics(model, t)) for t in trajectories]
    batch = make_batch(method, trajectories, [TokenFacts(*f) for f in found])
    shift = torch.Generator().manual_seed(5)
    rows = [
        replace(row, behaviour=logp + 0.4 * torch.randn(len(logp), generator=shift, dtype=torch.float64))
        for row, (logp, _) in zip(batch.rows, found, strict=True)
    ]
    batch = replace(batch, rows=tuple(rows))
    gradients = []
    for size, packing in ((10000, False), (24, False), (24, True), (90, True)):
        settings = StepSettings(size, packing, 0.0, torch.float64)
        accumulate_gradients(model, torch.optim.SGD(model.parameters()), batch, local_counts(batch), settings)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert all(relative(other, gradients[0]) <= 1e-12 for other in gradients[1:])


# Whole runs.


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``recipe(method, folder, **rl)``: three steps of two optimizer steps on a world with demonstrations."""
    others = tuple(method for method in registry.OWN if method.name not in NAMES)
    monkeypatch.setattr(registry, "OWN", (*others, *METHODS))
    sizes = {"num_key_value_heads": 1, "max_position_embeddings": 128}

    def make(method: str, folder: str = "run", **rl: Any) -> dict[str, Any]:
        own = {"method": method, "steps": 3, "mini_batch": 2, "max_tokens": 8, "checkpoint_every": 1}
        place = str(tmp_path / folder)
        value = "float(response[:1] in '0123')"
        return world_recipe(tmp_path, ["rl"], value, sizes, folder=place, seed=5, data={"limit": 12}, rl=own | rl)

    return make


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", NAMES)
def test_a_run_trains_groups_of_the_size_asked_for(recipe, method):
    lines = metrics(run(recipe(method)))
    assert [line["sequences"] for line in lines] == [16] * 3
    assert all(line["grad_norm"] > 0 for line in lines)
    if method == "on_policy":
        assert not any("shares" in line for line in lines)
    else:
        assert all(0 < line["shares"]["demonstration"] < 1 for line in lines)


@pytest.mark.parametrize("method", ["luffy", "srft"])
def test_a_run_that_broke_off_and_went_on_ends_with_the_same_bits(recipe, tmp_path, method):
    file = tmp_path / "breaking.py"
    # the third step's grading fails: 16 of every step's trajectories are graded, demonstrations among them
    file.write_text(
        "calls = 0\n"
        "def share(prompt, response, answer):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls > 40:\n"
        "        raise RuntimeError('out of order')\n"
        "    return float(response[:1] in '0123')\n"
    )
    options = {"options": {"entropy_level": "batch"}} if method == "srft" else {}
    broken = recipe(method, "broken", **options, reward=f"{file}:share")
    with pytest.raises(UserError, match="out of order"):
        run(broken)
    assert len(metrics(tmp_path / "broken")) == 2
    file.write_text((tmp_path / "own.py").read_text())
    ended = run(broken)
    whole = run(recipe(method, "whole", **options))
    a, b = (load_file(folder / "stages" / "rl" / "model" / "model.safetensors") for folder in (ended, whole))
    assert all(a[name].equal(b[name]) for name in a)
    assert [line["loss"] for line in metrics(ended)] == [line["loss"] for line in metrics(whole)]

"""Gradients of LUFFY, SRFT and their baselines against the formulas written out, and whole runs."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.methods.luffy_cases import METHODS, NAMES
from tests.oracle import gradient, relative, row_statistics
from tests.recipes import world_recipe
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import UserError
from thence.methods import registry
from thence.methods.base import TokenFacts, make_batch
from thence.methods.luffy import Luffy
from thence.methods.mixed_policy import MixedPolicy
from thence.methods.on_policy import OnPolicy
from thence.methods.rl_sft_loss import RlSftLoss
from thence.methods.srft import Srft
from thence.objective import local_counts
from thence.pipeline.rl_metrics import BatchMetrics
from thence.pipeline.rl_update import Update
from thence.pipeline.run import run
from thence.train.parallel import SingleProcess
from thence.train.policy import Policy
from thence.train.step import StepSettings, accumulate_gradients, train_step
from thence.train.trainer import Trainer


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

    def step_and_tell(policy, optimizer, batch, *rest):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        report = train_step(policy, optimizer, batch, *rest)
        taken.append((before, report, torch.cat([p.grad.flatten() for p in model.parameters()])))
        return report

    trajectories = make_trajectories(3, variant.method is not OnPolicy)
    old = {id(t): row_statistics(model, t)[0].detach() for t in trajectories}
    trainer = Trainer(model, 2e-2, StepSettings(64, True, 0.0, torch.float64), take_step=step_and_tell)
    stage: Any = SimpleNamespace(temperature=1.0, importance_bound=None, fault=None)
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
        accumulate_gradients(Policy(model), torch.optim.SGD(model.parameters()), batch, local_counts(batch), settings)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert all(relative(other, gradients[0]) <= 1e-12 for other in gradients[1:])


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

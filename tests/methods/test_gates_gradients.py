"""Gradients of ReLIFT, HPT, SuperRL and SASR against their formulas, and resuming."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.methods.gates_cases import OWN, FakeSampler, kinds, right
from tests.oracle import gradient, relative, row_statistics
from tests.recipes import world_recipe
from thence.data.trajectory import Trajectory
from thence.methods import registry
from thence.methods.base import Method, SideStep, make_batch, make_rows
from thence.methods.hpt import Hpt
from thence.methods.relift import Relift
from thence.methods.sasr import Sasr
from thence.methods.superrl import SuperRl
from thence.objective import Batch, local_counts
from thence.pipeline.progress import NullWatcher
from thence.pipeline.run import run
from thence.train.policy import Policy
from thence.train.step import StepSettings, accumulate_gradients
from thence.train.trainer import Trainer

WAYS = [(10**6, False), (30, False), (30, True), (1, True)]  # tokens of a micro-batch, packing


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
    accumulate_gradients(
        Policy(model), torch.optim.SGD(model.parameters(), lr=0.0), batch, local_counts(batch), settings
    )
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


@pytest.mark.matrix(6)
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


@pytest.mark.matrix(2)
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

"""TRAPO's gradients against the formula written out, however the rows are cut, and whole runs with several rounds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import thence.pipeline.rl_stage as rl_stage
from tests.methods.trapo_cases import levels
from tests.oracle import gradient, relative, row_statistics
from tests.recipes import world_recipe
from thence.data.trajectory import Prompt, Trajectory
from thence.methods.base import make_batch
from thence.methods.groups import groups_of
from thence.methods.trapo import Trapo
from thence.objective import Batch, local_counts
from thence.pipeline.rl_metrics import BatchMetrics
from thence.pipeline.rl_update import Update
from thence.pipeline.run import run
from thence.pipeline.sampler import RolloutSampler
from thence.train.parallel import SingleProcess
from thence.train.policy import Policy
from thence.train.step import StepSettings, accumulate_gradients, train_step
from thence.train.trainer import Trainer

VARIANTS: list[dict[str, Any]] = [
    {"alpha": 0.03},
    {"preset": "code", "code_tokens": 11, "alpha": 0.04, "entropy": 0.2},
    {"preset": "paper", "std": True, "alpha": 0.02, "prefix_weight": 0.7, "entropy": 0.0},
]
# Of each of a group's eight responses: round, begun tokens (None: the demonstration), reward.
GUIDED = [(0, 0, 0.0), (0, 0, 1.0), (0, 0, 0.0), (0, 0, 0.0), (1, 2, 0.0), (1, 2, 0.5), (2, 4, 1.0), (3, None, 1.0)]
PLAIN = [(0, 0, 1.0), (0, 0, 1.0), (0, 0, 1.0), (0, 0, 0.0), (1, 0, 1.0), (1, 0, 0.0), (2, 4, 0.0), (3, 0, 1.0)]


def make_trajectories(seed: int) -> list[Trajectory]:
    """Four groups, of which every second is guided in all rounds, with random tokens."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(least: int) -> tuple[int, ...]:
        size = least + int(torch.randint(1, 7, (), generator=generator))
        return tuple(torch.randint(40, (size,), generator=generator).tolist())

    found = []
    for index in range(4):
        shown = tokens(6)
        prompt = Prompt(index, tokens(0), shown, draw=index)
        for number, begun, reward in (GUIDED, PLAIN)[index % 2]:
            if begun is None:
                made = Trajectory(prompt, shown, "demonstration", reward)
            else:
                made = Trajectory(prompt, (*shown[:begun], *tokens(0)), score=reward, prefix=begun)
            found.append(made.in_round(number))
    return found


def stated_loss(options: dict[str, Any], model: Any, chosen: list[Trajectory], old: dict[int, Any]) -> torch.Tensor:
    """The formula in plain words, for whole groups; ``old``: log-probabilities when the batch was sampled."""
    o = {"prefix_weight": 1.0, "entropy": 0.001, "std": False} | options
    n_all = sum(len(t.response_ids) for t in chosen)
    z = 8 * o["code_tokens"] if o.get("preset") == "code" else n_all
    loss = torch.zeros((), dtype=torch.float64)
    for group in groups_of(chosen):
        scores = torch.tensor([t.score for t in group], dtype=torch.float64)
        gains = scores - scores.mean()
        if o["std"]:
            gains = gains / (scores.std() + 1e-6)
        for place, (t, gain) in enumerate(zip(group, gains.tolist(), strict=True)):
            logp, entropy = row_statistics(model, t)
            begun = len(logp) if t.origin == "demonstration" else t.prefix
            ratio = (logp - old[id(t)]).exp()
            p = logp.exp()
            edge = torch.tensor(o["alpha"], dtype=torch.float64)
            bounded = torch.where(p >= edge, logp, p / edge - 1 + edge.log())[:begun]
            loss = loss - gain * ratio[begun:].sum() / z - o["entropy"] * entropy.sum() / n_all
            if place != 4:  # the first of two that begin with the same prefix
                loss = loss - o["prefix_weight"] * bounded.sum() / z
    return loss


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_gradients_of_both_optimizer_steps_are_those_of_the_formula(tiny_model: Any, options: dict[str, Any]) -> None:
    model, taken = tiny_model(), []

    def step_and_tell(policy: Any, optimizer: Any, batch: Any, *rest: Any) -> Any:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        report = train_step(policy, optimizer, batch, *rest)
        taken.append((before, report, torch.cat([p.grad.flatten() for p in model.parameters()])))
        return report

    trajectories = make_trajectories(3)
    old = {id(t): row_statistics(model, t)[0].detach() for t in trajectories}
    begun = torch.cat([old[id(t)][: t.prefix] for t in trajectories])
    assert (begun.exp() < options["alpha"]).any() and (begun.exp() > options["alpha"]).any()
    trainer = Trainer(model, 2e-2, StepSettings(64, True, 0.0, torch.float64), take_step=step_and_tell)
    stage: Any = SimpleNamespace(temperature=1.0, importance_bound=None, fault=None)
    method = Trapo(options)
    Update(stage, method, trainer, minis=2).take(trajectories, BatchMetrics(SingleProcess(), method.terms))
    assert len(taken) == 2
    for part, (before, report, got) in zip((slice(0, 16), slice(16, 32)), taken, strict=True):
        model.load_state_dict(before)
        loss = stated_loss(options, model, trajectories[part], old)
        assert report.loss == pytest.approx(loss.item(), rel=1e-10, abs=1e-12)
        assert relative(got, gradient(model, loss)) <= 1e-10
    moved = torch.cat([row_statistics(model, t)[0].detach() - old[id(t)] for t in trajectories[16:]])
    assert moved.abs().max() > 0.3  # the policy of the second step is another


def moved_batch(method: Trapo, model: Any, trajectories: list[Trajectory]) -> Batch:
    """The batch, sampled by a policy that is a little off."""
    batch, shift = make_batch(method, trajectories), torch.Generator().manual_seed(5)
    rows = []
    for row, t in zip(batch.rows, trajectories, strict=True):
        logp = row_statistics(model, t)[0].detach()
        rows.append(replace(row, behaviour=logp + 0.4 * torch.randn(len(logp), generator=shift).double()))
    return replace(batch, rows=tuple(rows))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    options=st.sampled_from(VARIANTS), tokens=st.integers(1, 120), packing=st.booleans(), order=st.randoms(),
)  # fmt: skip
def test_the_gradient_does_not_depend_on_micro_batches_order_or_packing(
    tiny_model: Any, options: dict[str, Any], tokens: int, packing: bool, order: Any
) -> None:
    model, method = tiny_model(), Trapo(options)
    batch = moved_batch(method, model, make_trajectories(4))
    shuffled = list(batch.rows)
    order.shuffle(shuffled)
    found = []
    for rows, size, packed in ((batch.rows, 10_000, False), (tuple(shuffled), tokens, packing)):
        cut, own = StepSettings(size, packed, 0.0, torch.float64), replace(batch, rows=rows)
        accumulate_gradients(Policy(model), torch.optim.SGD(model.parameters()), own, local_counts(own), cut)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert found[0].norm() > 0
    assert relative(found[1], found[0]) <= 1e-12


def recipe_of(folder: Path, **rl: Any) -> dict[str, Any]:
    """Three steps on a world with demonstrations, whose random policy is right now and then."""
    own = {"method": "trapo", "rollouts": 8, "steps": 3, "mini_batch": 2, "max_tokens": 24, "checkpoint_every": 1}
    value = "float(response[:1] in '012')"
    return world_recipe(folder, ["rl"], value, seed=3, data={"limit": 12}, rl=own | rl)


def composed_of(monkeypatch: pytest.MonkeyPatch) -> list[list[Trajectory]]:
    """What the method composes from now on in runs, batch by batch."""
    heard: list[list[Trajectory]] = []
    compose = Trapo.compose

    def listened(method: Trapo, sampler: Any, prompts: int, n: int) -> list[Trajectory]:
        found = compose(method, sampler, prompts, n)
        heard.extend([found] if isinstance(sampler, RolloutSampler) else [])
        return found

    monkeypatch.setattr(Trapo, "compose", listened)
    return heard


def test_a_run_samples_in_rounds_and_counts_what_it_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = composed_of(monkeypatch)
    folder = run(recipe_of(tmp_path), {"folder": str(tmp_path / "run")})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {tuple(levels(group)) for batch in heard for group in groups_of(batch)}
    assert len(found) > 1 and any(any(level) for level in found), found
    for line, batch in zip(lines, heard, strict=True):
        assert line["sampled_tokens"] == sum(t.sampled_tokens for t in batch)
        assert line["sequences"] == len(batch) == 32
        assert line["grad_norm"] > 0
        own = [t.response_ids for t in batch if not t.prefix and t.origin == "rollout"]
        assert len(set(own)) > 0.9 * len(own) >= 0.9 * 16  # no round repeats the random numbers of another
    assert any("prefix" in line.get("shares", {}) for line in lines)
    assert any("demonstration" in line.get("shares", {}) for line in lines)


def test_a_run_that_was_cut_off_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path)
    whole = run(recipe, {"folder": str(tmp_path / "whole")})
    step = rl_stage.Loop.step

    def cut_off(loop: rl_stage.Loop, at: int) -> dict[str, Any]:
        if at == 2:
            raise InterruptedError
        return step(loop, at)

    with monkeypatch.context() as patch:
        patch.setattr(rl_stage.Loop, "step", cut_off)
        with pytest.raises(InterruptedError):
            run(recipe, {"folder": str(tmp_path / "cut")})
    resumed = run(recipe, {"folder": str(tmp_path / "cut")})
    model = Path("stages/rl/model/model.safetensors")
    assert (resumed / model).read_bytes() == (whole / model).read_bytes()


def test_rollouts_in_rounds_are_those_of_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared, plain = [], Trapo.compose

    def compose(method: Trapo, sampler: RolloutSampler, prompts: int, n: int) -> list[Trajectory]:
        if not isinstance(sampler, RolloutSampler):
            return plain(method, sampler, prompts, n)
        asked = sampler.next_prompts(prompts)
        before = sampler.context.meter.total
        whole = sampler.rollouts(asked, 8)
        cost = sampler.context.meter.total - before
        rounds = [sampler.rollouts(asked, size, first=first) for size, first in ((4, 0), (2, 4), (1, 6), (1, 7))]
        assert sampler.context.meter.total - before > 2 * cost  # every round reads the prompts
        for i in range(len(asked)):
            parts = [
                t for found, size in zip(rounds, (4, 2, 1, 1), strict=True) for t in found[i * size : (i + 1) * size]
            ]
            assert [t.response_ids for t in parts] == [t.response_ids for t in whole[8 * i : 8 * i + 8]]
        assert len({t.response_ids for t in whole}) > len(whole) / 2
        begins = [(prompt.demonstration_ids or ())[:2] for prompt in asked]
        first, then = (sampler.continuations(asked, begins, 1, first=number) for number in (0, 1))
        both = sampler.continuations(asked, begins, 2)
        assert [t.response_ids for pair in zip(first, then, strict=True) for t in pair] == [
            t.response_ids for t in both
        ]
        assert [t.response_ids for t in first] != [t.response_ids for t in then]
        compared.append(len(asked))
        return whole

    monkeypatch.setattr(Trapo, "compose", compose)
    run(recipe_of(tmp_path, steps=1), {"folder": str(tmp_path / "run")})
    assert compared == [4]


def test_tokens_are_told_by_the_text_that_each_has_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, plain = [], Trapo.compose

    def compose(method: Trapo, sampler: RolloutSampler, prompts: int, n: int) -> list[Trajectory]:
        if isinstance(sampler, RolloutSampler):
            tokenizer = sampler.context.tokenizer
            ids = [token for token in range(len(tokenizer)) for _ in range(2)]
            told.append((sampler.token_texts(ids), [tokenizer.decode([token]) for token in ids]))
        return plain(method, sampler, prompts, n)

    monkeypatch.setattr(Trapo, "compose", compose)
    run(recipe_of(tmp_path, steps=1), {"folder": str(tmp_path / "run")})
    ((texts, expected),) = told
    assert texts == expected and len(set(texts)) > 10

"""CISPO, DPPO and IPO: bounded and masked ratios, against golden vectors and the formulas by autograd."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.methods.test_gspo import GROUP, MINIS, advantages, make_trajectories, steps_of
from tests.oracle import gradient, relative, row_statistics
from tests.recipes import world_recipe
from thence.data.trajectory import Trajectory
from thence.errors import RecipeError
from thence.methods.registry import make_method
from thence.objective import CappedRatio, Context, SquaredGap, TrustMask, binary_kl
from thence.pipeline.rl_metrics import BatchMetrics
from thence.pipeline.run import run
from thence.train.parallel import SingleProcess


def at(surrogate: Any, old: float, new: float, weight: float) -> tuple[float, float]:
    """Value and slope at a probability that was ``old`` and is ``new``."""
    logp, behaviour = (torch.tensor([p], dtype=torch.float64).log() for p in (new, old))
    context = Context(torch.tensor([weight], dtype=torch.float64), behaviour)
    return surrogate.value(logp, context).item(), surrogate.slope(logp, context).item()


# The published vectors.


@pytest.mark.parametrize(("cap", "weight", "loss"), [(5.0, 10.0, 3.566749), (1.2, 2.4, 0.856020)])
def test_cispo_golden_vector(cap: float, weight: float, loss: float) -> None:
    value, slope = at(CappedRatio(0.0, cap), 0.1, 0.7, 2.0)
    assert 2 * slope == pytest.approx(weight) and -2 * value == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "advantage", "slope"), [(0.01, 0.05, 1.0, 5.0), (0.5, 0.75, 1.0, 0.0), (0.5, 0.75, -1.0, 1.5)]
)
def test_dppo_golden_vector(old: float, new: float, advantage: float, slope: float) -> None:
    assert at(TrustMask("tv", 0.15, 0.15, 1e4), old, new, advantage)[1] == pytest.approx(slope)


@pytest.mark.parametrize(
    ("measure", "old", "new", "weight", "kept"),
    [
        ("band", 0.5, 0.61, -1.0, False),
        ("band", 0.5, 0.59, 1.0, True),
        ("band", 0.5, 0.39, 1.0, False),
        ("tv", 0.5, 0.39, 1.0, True),
        ("tv", 0.5, 0.39, -1.0, False),
        ("kl", 0.5, 0.75, 1.0, False),  # KL 0.1438
        ("kl", 0.5, 0.75, -1.0, True),  # it leads back
        ("kl", 0.5, 0.25, -1.0, False),
        ("kl", 0.5, 0.55, 1.0, True),
    ],
)
def test_what_a_mask_keeps(measure: Any, old: float, new: float, weight: float, kept: bool) -> None:
    slope = at(TrustMask(measure, 0.1, 0.1), old, new, weight)[1]
    assert slope == pytest.approx(new / old if kept else 0.0)


def test_the_binary_kl_by_hand_and_at_its_ends() -> None:
    logp, old = (torch.tensor(values, dtype=torch.float64).log() for values in ([0.75, 1.0, 1.0], [0.5, 1.0, 0.5]))
    by_hand = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert binary_kl(logp, old).tolist() == [pytest.approx(by_hand), 0.0, math.inf]


def test_nothing_acts_before_the_policy_has_moved() -> None:
    logp, context = torch.tensor([-1.0, -0.1]).double(), Context(torch.tensor([1.0, -1.0]))
    for surrogate in (CappedRatio(0.5, 1.5), TrustMask("tv"), TrustMask("kl"), TrustMask("band")):
        assert surrogate.slope(logp, context).tolist() == [1.0, 1.0]
        assert not surrogate.held_back(logp, context).any()
    assert SquaredGap().slope(logp, context).tolist() == [0.0, 0.0]


# Two methods and their variants over the optimizer steps of a rollout batch.

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "cispo": ("cispo", {"cap": 1.1, "floor": 0.9}),
    "cispo, means of responses, entropy": ("cispo", {"cap": 1.02, "aggregation": "sequence-mean", "entropy": 0.1}),
    "dppo": ("dppo", {"low": 1e-3, "high": 2e-3, "ratio_bound": 1.03}),
    "dppo, kl": ("dppo", {"divergence": "kl", "low": 1e-5, "high": 2e-5, "kappa": 0.3}),
    "ipo": ("ipo", {"bound": 1e-3, "kappa": 0.3}),
}


def stated(name: str, o: Any, model: Any, part: list[Trajectory], old: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The loss as printed, by autograd; and which of its tokens a bound holds back."""
    rows, tokens = len(part), sum(len(t.response_ids) for t in part)
    loss, held = torch.zeros((), dtype=torch.float64), []
    for trajectory, gain, before in zip(part, advantages([t.score or 0.0 for t in part], o.std), old, strict=True):
        logp, entropy = row_statistics(model, trajectory)
        share = 1 / tokens if o.aggregation == "token-mean" else 1 / (rows * len(logp))
        now = logp.detach()
        ratio, change = (now - before).exp(), now.exp() - before.exp()
        if name == "cispo":
            factor = ratio.clamp(o.floor, o.cap)
            held.append(factor != ratio)
        else:
            if name == "ipo":
                keep = change.abs() <= o.bound
            elif o.divergence == "tv":
                keep = change <= o.high if gain > 0 else change >= -o.low
            else:
                p, q = now.exp(), before.exp()
                far = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
                keep = (far <= o.high) | (p <= q) if gain > 0 else (far <= o.low) | (p >= q)
            factor = ratio.clamp(max=o.ratio_bound) * keep
            held.append(~keep)
            loss = loss + o.kappa * share * (logp - before).square().sum()
        loss = loss - gain * share * (factor * logp).sum() - o.entropy * entropy.sum() / tokens
        held[-1] = held[-1] & bool(gain)
    return loss, torch.cat(held)


@pytest.mark.parametrize("case", OPTIONS)
def test_gradients_and_clipped_tokens_of_all_optimizer_steps_are_those_of_the_formula(tiny_model, case):
    name, options = OPTIONS[case]
    model, method = tiny_model(), make_method(name, options, "rl")
    trajectories = make_trajectories(model)
    old = [row_statistics(model, t)[0].detach() for t in trajectories]
    metrics = BatchMetrics(SingleProcess(), method.terms)
    taken = steps_of(model, method, trajectories, metrics=metrics)
    shares = []
    for number, (before, _, got) in enumerate(taken):
        model.load_state_dict(before)
        part = slice(number * GROUP, (number + 1) * GROUP)
        loss, held = stated(name, method.options, model, trajectories[part], old[part])
        assert relative(got, gradient(model, loss)) <= 1e-12
        shares.append(held.double().mean().item())
        assert metrics.reports[number].clip_share == pytest.approx(shares[-1])
    assert shares[0] == 0 and all(0 < share < 1 for share in shares[1:]), "every bound acts, on some tokens"


@settings(max_examples=12, deadline=None)
@given(budget=st.integers(1, 80), packing=st.booleans(), case=st.sampled_from(sorted(OPTIONS)))
def test_the_update_does_not_depend_on_the_partition(budget: int, packing: bool, case: str) -> None:
    from tests.tiny_model import make_tiny_model

    name, options = OPTIONS[case]
    ends = []
    for cut in ((10_000, False), (budget, packing)):
        model = make_tiny_model()
        taken = steps_of(model, make_method(name, options, "rl"), make_trajectories(model), *cut)
        assert len(taken) == MINIS
        ends.append(torch.cat([got for _, _, got in taken]))
    assert relative(ends[1], ends[0]) <= 1e-9


# As a stage of a run.


@pytest.mark.parametrize("name", ["cispo", "dppo", "ipo"])
def test_a_run_with_two_optimizer_steps_a_batch(tmp_path, name):
    rl = {"method": name, "mini_batch": 2, "steps": 2, "max_tokens": 8}
    value = "float(sum(map(ord, response)) % 3 == 0)"
    recipe = world_recipe(tmp_path, ["rl"], value, data={"limit": 8}, rl=rl)
    folder = run({**recipe, "folder": str(tmp_path / "run")})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["grad_norm"] > 0 for line in lines)


@pytest.mark.parametrize("name", ["gspo", "cispo", "dppo", "ipo", "grpo"])
def test_a_bound_that_cannot_act_is_said(tmp_path, caplog, name):
    recipe = world_recipe(tmp_path, ["rl"], data={"limit": 8}, rl={"method": name, "steps": 1, "max_tokens": 4})
    with caplog.at_level(logging.WARNING):
        run({**recipe, "folder": str(tmp_path / "run")})
    said = [record.getMessage() for record in caplog.records if "cannot act" in record.getMessage()]
    assert len(said) == (name != "grpo")
    assert all("Set rl.mini_batch to a part of the 4 prompts" in text for text in said)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("cispo", {"cap": 0.2}, "cap bounds the ratio"),
        ("cispo", {"floor": 1.2}, "floor"),
        ("cispo", {"clip_high": 0.2}, "clip_high"),
        ("dppo", {"divergence": "js"}, "divergence"),
        ("dppo", {"low": -0.1}, "low"),
        ("ipo", {"low": 0.1}, "low"),
        ("ipo", {"ratio_bound": 0.5}, "ratio_bound"),
    ],
)
def test_options_that_mean_nothing_are_refused(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says) as refused:
        make_method(name, options, "rl")
    assert refused.value.field and refused.value.field.startswith("rl.options") and refused.value.remedy

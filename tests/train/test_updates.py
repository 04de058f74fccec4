"""Updates: those of AdamW on the plain gradient, clipped as torch clips, at the rate of the schedule."""

from __future__ import annotations

import pytest
import torch

from tests.oracle import (
    contributions,
    gradient,
    make_batch,
    make_case,
    relative,
)
from tests.train.stepping import LENGTHS, SFT, oracle_step, parameters_of, plain_adamw, trainer_of
from thence.train.parallel import SingleProcess
from thence.train.policy import Policy
from thence.train.schedule import learning_rate
from thence.train.step import StepSettings, train_step


@pytest.mark.parametrize("clip_norm", [0.0, 0.3, 1e6], ids=["off", "clips", "too large to clip"])
def test_clipping_is_that_of_torch_on_the_plain_gradient(tiny_model, clip_norm):
    model = tiny_model()
    case = make_case(model, SFT, LENGTHS, 3, 0)
    plain = gradient(model, contributions(model, case, SFT)[0].sum())
    alone = torch.nn.Parameter(torch.zeros_like(plain))
    alone.grad = plain.clone()
    torch.nn.utils.clip_grad_norm_([alone], clip_norm or float("inf"))
    before = parameters_of(model)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    report = train_step(
        Policy(model), sgd, make_batch(case, SFT), SingleProcess(), StepSettings(60, False, clip_norm, torch.float64)
    )
    update = before - parameters_of(model)
    assert report.grad_norm == pytest.approx(plain.norm().item(), rel=1e-12)
    assert relative(update, alone.grad) <= 1e-5  # torch adds 1e-6 to the norm
    if clip_norm == 0.3:
        assert update.norm().item() == pytest.approx(0.3, rel=1e-12)
    else:
        assert relative(update, plain) <= 1e-12


def test_updates_are_those_of_adamw_on_the_plain_gradient_with_a_state_for_each_kind_of_step(tiny_model):
    model, twin = tiny_model(kind="qwen2"), tiny_model(kind="qwen2")
    cases = [make_case(model, SFT, LENGTHS, 3, seed) for seed in range(4)]
    kinds = ["main", "demonstrations", "main", "main"]
    trainer = trainer_of(model, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.1)
    adamws = {kind: plain_adamw(twin, 0.1) for kind in kinds}
    for case, kind in zip(cases, kinds, strict=True):
        trainer.step(make_batch(case, SFT), optimizer=kind)
        oracle_step(twin, adamws[kind], case, SFT)
    assert relative(parameters_of(model), parameters_of(twin)) <= 1e-12
    plain, tensors = trainer.state()
    steps = {key.split("/")[0]: value.item() for key, value in tensors.items() if key.endswith("/step")}
    assert steps == {"main": 3, "demonstrations": 1}
    assert plain == {"steps_taken": 3, "optimizers": ["demonstrations", "main"]}


def test_the_learning_rate_follows_the_number_of_steps_taken(tiny_model):
    model = tiny_model()
    trainer = trainer_of(model, lambda step: (0.01, 0.0)[step])
    batch = make_batch(make_case(model, SFT, LENGTHS, 3, 0), SFT)
    start = parameters_of(model)
    trainer.step(batch)
    first = parameters_of(model)
    trainer.step(batch)
    assert not torch.equal(first, start)
    assert torch.equal(parameters_of(model), first)


@pytest.mark.parametrize(
    ("schedule", "warmup", "floor", "expected"),
    [
        ("constant", 0.0, 0.0, [2, 2, 2, 2, 2]),
        ("constant", 0.4, 0.0, [1, 2, 2, 2, 2]),
        ("linear", 0.0, 0.0, [2, 1.5, 1, 0.5, 0]),
        ("linear", 0.0, 0.5, [2, 1.75, 1.5, 1.25, 1]),
        ("linear", 0.2, 0.1, [2, 2, 1.4, 0.8, 0.2]),
        ("cosine", 0.0, 0.0, [2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5, 0]),
        ("cosine", 0.4, 0.1, [1, 2, 2, 1.1, 0.2]),
        ("cosine", 1.0, 0.1, [0.4, 0.8, 1.2, 1.6, 2]),
    ],
)
def test_schedules(schedule, warmup, floor, expected):
    rates = [learning_rate(t, 5, peak=2.0, schedule=schedule, warmup=warmup, floor=floor) for t in range(5)]
    assert rates == pytest.approx(expected, abs=1e-12)


def test_a_schedule_of_one_step_trains_and_an_unknown_one_is_an_error():
    assert learning_rate(0, 1, peak=2.0, schedule="cosine", warmup=0.1, floor=0.1) == 2.0
    with pytest.raises(ValueError, match="wavy"):
        learning_rate(0, 1, peak=2.0, schedule="wavy", warmup=0.0, floor=0.0)

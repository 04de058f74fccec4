"""A step on rollouts of several turns: the policy's tokens of all turns are trained, and what it read is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.train.small_models import make
from thence.data.trajectory import Observation, Prompt, Trajectory
from thence.methods.base import bare_row, make_batch
from thence.methods.facts import TokenFacts
from thence.methods.registry import make_method
from thence.train.policy import Policy
from thence.train.step import StepSettings
from thence.train.trainer import Trainer

METHODS = ["grpo", "dapo", "dr_grpo", "gspo", "cispo"]
SCORES = (1.0, 0.0, 0.0, 0.5)


def rollouts() -> list[Trajectory]:
    """Two groups of two; rollouts of one, two and three turns."""
    generator = torch.Generator().manual_seed(5)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, 40, (count,), generator=generator).tolist())

    found = []
    for i, (turns, score) in enumerate(zip((3, 1, 2, 2), SCORES, strict=True)):
        prompt = Prompt(i // 2, (7, 8, 9 + i // 2))
        said = tuple(Observation(3 * (turn + 1), ids(2 + turn)) for turn in range(turns - 1))
        found.append(Trajectory(prompt, ids(3 * turns), score=score, verdict="right", observations=said))
    return found


def logps(model: Any, row: list[int]) -> Tensor:
    """Log-probability of every token of a row but the first, from the model's own logits."""
    ids = torch.tensor([row])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


def gradient(value: Tensor, model: Any) -> Tensor:
    found = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, allow_unused=True)
    return torch.cat([
        torch.zeros(p.numel(), dtype=torch.float64) if g is None else g.flatten()
        for g, p in zip(found, model.parameters(), strict=True)
    ])  # fmt: skip


def stepped(name: str, found: list[Trajectory], **settings: Any) -> tuple[Any, Tensor]:
    """The model before a step, and the gradient that plain descent took: the change of the parameters."""
    model, options = make("llama"), ({"constant_tokens": 40} if name == "dr_grpo" else {})
    method = make_method(name, options, "rl")
    method.prepare(2, 40)
    trainer = Trainer(
        Policy(model), lambda step: 0.0, StepSettings(clip_norm=0.0, compute_dtype=torch.float64, **settings)
    )
    kept: list[Tensor] = []

    def keep(*_: Any, **__: Any) -> None:
        kept.append(torch.cat([
            torch.zeros(p.numel(), dtype=torch.float64) if p.grad is None else p.grad.flatten().clone()
            for p in model.parameters()
        ]))  # fmt: skip

    handle = register_optimizer_step_pre_hook(keep)
    try:
        now = trainer.statistics([bare_row(t) for t in found], 1.0)
        facts = [TokenFacts(logp, entropy, logp) for logp, entropy in now] if method.uses_old else []
        trainer.step(make_batch(method, found, facts))
    finally:
        handle.remove()
    return model, kept[0]


@pytest.mark.parametrize("packing", [False, True])
def test_the_gradient_is_that_of_the_policys_own_tokens_alone(packing: bool) -> None:
    found = rollouts()
    model, got = stepped("grpo", found, packing=packing, micro_batch_tokens=24)
    advantages, count = (0.5, -0.5, -0.25, 0.25), sum(len(t.response_ids) for t in found)
    objective = torch.zeros((), dtype=torch.float64)
    for trajectory, advantage in zip(found, advantages, strict=True):
        after, written = trajectory.after_prompt()
        own = logps(model, [*trajectory.prompt.token_ids, *after])[len(trajectory.prompt.token_ids) - 1 :]
        objective = objective - advantage * (own * torch.tensor(written)).sum() / count
    expected = gradient(objective, model)
    assert float((got - expected).norm() / expected.norm()) < 1e-12


@pytest.mark.parametrize("name", METHODS)
def test_the_weights_that_a_step_gave_are_zero_on_observations_and_one_advantage_on_the_turns(name: str) -> None:
    """Every token's gradient by itself, and the weights with which they add up to the step's gradient."""
    found = rollouts()
    model, got = stepped(name, found)
    columns, own = [], []
    for trajectory in found:
        after, written = trajectory.after_prompt()
        values = logps(model, [*trajectory.prompt.token_ids, *after])[len(trajectory.prompt.token_ids) - 1 :]
        columns += [gradient(value, model) for value in values]
        own += written
    matrix = torch.stack(columns, 1)
    assert torch.linalg.matrix_rank(matrix) == matrix.shape[1], "every token's weight can be told"
    weights = torch.linalg.lstsq(matrix, -got[:, None]).solution[:, 0]
    told = torch.tensor(own)
    assert float(weights[~told].abs().max()) < 1e-7 and int((~told).sum()) == 9
    sizes = [len(t.response_ids) for t in found]
    for part, score in zip(weights[told].split(sizes), (1, -1, -1, 1), strict=True):
        assert float((part - part[0]).abs().max()) < 1e-7 and part[0] * score > 1e-3


def test_a_rollout_without_observations_is_the_row_that_it_always_was() -> None:
    plain = Trajectory(Prompt(0, (1, 2)), (3, 4, 5))
    row = bare_row(plain)
    assert row.token_ids.tolist() == [1, 2, 3, 4, 5] and row.trained.tolist() == [False, False, True, True, True]

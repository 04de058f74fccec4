"""The gradient on responses of an earlier policy, in float64: that of decoupled PPO, written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle import gradient, relative
from thence.data.trajectory import Prompt, Trajectory
from thence.methods.grpo import Grpo
from thence.pipeline.rl_metrics import BatchMetrics
from thence.pipeline.rl_update import Update
from thence.recipe import Rl
from thence.train.parallel import SingleProcess
from thence.train.step import StepSettings, train_step
from thence.train.trainer import Trainer

GROUPS, N, TEMPERATURE = 4, 4, 0.7
KL, ENTROPY = 0.03, 0.02


def row_logps(model: Any, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the response tokens, at the sampling temperature, by a plain pass."""
    ids = torch.tensor([[*trajectory.prompt.token_ids, *trajectory.response_ids]])
    logp_TV = torch.log_softmax(
        model(input_ids=ids).logits[0, len(trajectory.prompt.token_ids) - 1 : -1] / TEMPERATURE, -1
    )
    taken = logp_TV.gather(1, torch.tensor(trajectory.response_ids)[:, None])[:, 0]
    return taken, -(logp_TV.exp() * logp_TV).sum(-1)


def made(model: Any) -> list[Trajectory]:
    """Responses that an earlier policy sampled: the log-probabilities are those of other weights."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for i in range(GROUPS * N):
        ids = torch.randint(model.config.vocab_size, (2 + i % 3 + 3 + i % 5,), generator=generator).tolist()
        cut = 2 + i % 3
        prompt = Prompt(i // N, tuple(ids[:cut]), draw=i // N)
        bare = Trajectory(prompt, tuple(ids[cut:]), score=float(i % 3 == 0), version=0)
        with torch.no_grad():
            now, _ = row_logps(model, bare)
        drift = 0.9 * torch.randn(len(now), generator=generator, dtype=torch.float64)
        found.append(
            Trajectory(prompt, bare.response_ids, score=bare.score, sampler_logps=tuple((now + drift).tolist()))
        )
    return found


def steps_of(model: Any, stage: Rl, trajectories: list[Trajectory]) -> tuple[list[tuple[Any, Tensor]], BatchMetrics]:
    taken = []

    def step_and_tell(policy: Any, optimizer: Any, batch: Any, *rest: Any) -> Any:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        report = train_step(policy, optimizer, batch, *rest)
        taken.append((before, torch.cat([p.grad.flatten() for p in model.parameters()])))
        return report

    settings = StepSettings(64, False, 0.0, torch.float64)
    trainer = Trainer(model, 2e-2, settings, take_step=step_and_tell, reference=REFERENCE)
    method = Grpo({"kl": KL, "entropy": ENTROPY})
    metrics = BatchMetrics(SingleProcess(), method.terms)
    Update(stage, method, trainer, stage.prompts // (stage.mini_batch or stage.prompts)).take(trajectories, metrics)
    return taken, metrics


def stated_loss(
    model: Any, part: list[Trajectory], proximal: list[Tensor], reference: list[Tensor], bound: float
) -> Tensor:
    """The loss of one optimizer step as it is printed in ``rollout/correction.py``, by autograd, token by token."""
    rewards = torch.tensor([t.score for t in part], dtype=torch.float64).view(-1, N)
    gains = (rewards - rewards.mean(1, keepdim=True)).flatten()
    tokens = sum(len(t.response_ids) for t in part)
    loss = torch.zeros((), dtype=torch.float64)
    for trajectory, gain, prox, ref in zip(part, gains, proximal, reference, strict=True):
        logp, entropy = row_logps(model, trajectory)
        behaviour = torch.tensor(trajectory.sampler_logps, dtype=torch.float64)
        weight = torch.minimum((prox - behaviour).exp(), torch.tensor(bound, dtype=torch.float64))
        ratio = (logp - prox).exp()
        clipped = ratio.clamp(1 - 0.2, 1 + 0.28)
        policy = weight * torch.minimum(ratio * gain, clipped * gain)
        k3 = (ref - logp).exp() - 1 - (ref - logp)  # neither the KL nor the bonus is a term of the sampled tokens
        loss = loss - (policy - KL * k3 + ENTROPY * entropy).sum() / tokens
    return loss


REFERENCE: Any = None


@pytest.mark.parametrize("bound", [None, 1.1, 2.0])
@pytest.mark.parametrize("mini_batch", [None, 2])
def test_every_optimizer_step_has_the_gradient_of_decoupled_ppo(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, mini_batch: int | None, bound: float | None
) -> None:
    model, other = tiny_model(), tiny_model(seed=1)
    monkeypatch.setattr("tests.pipeline.test_ahead_gradient.REFERENCE", other)
    trajectories = made(model)
    stage = Rl(
        ahead=1, prompts=GROUPS, rollouts=N, mini_batch=mini_batch, importance_bound=bound, temperature=TEMPERATURE
    )
    with torch.no_grad():
        proximal = [row_logps(model, t)[0] for t in trajectories]
        reference = [row_logps(other, t)[0] for t in trajectories]
    taken, metrics = steps_of(model, stage, trajectories)
    size = (mini_batch or GROUPS) * N
    assert len(taken) == GROUPS * N // size
    for number, (before, got) in enumerate(taken):
        model.load_state_dict(before)
        part = slice(number * size, (number + 1) * size)
        loss = stated_loss(model, trajectories[part], proximal[part], reference[part], bound or 2.0)
        assert relative(got, gradient(model, loss)) <= 1e-11
        if number:  # against the sampler alone, or without weights, it is another one
            behaviour = [torch.tensor(t.sampler_logps, dtype=torch.float64) for t in trajectories]
            wrong = stated_loss(model, trajectories[part], behaviour[part], reference[part], 1e9)
            assert relative(got, gradient(model, wrong)) > 1e-2
    weights = [
        (prox - torch.tensor(t.sampler_logps, dtype=torch.float64)).exp()
        for prox, t in zip(proximal, trajectories, strict=True)
    ]
    every, limit = torch.cat(weights), bound or 2.0
    assert metrics.trust is not None
    assert metrics.trust[0] / metrics.trust[2] == pytest.approx(float(every.clamp(max=limit).mean()), rel=1e-12)
    assert metrics.trust[1] == int((every >= limit).sum()) > 0

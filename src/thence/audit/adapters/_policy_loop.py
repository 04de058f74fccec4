"""A plain loop of reinforcement learning around a stack's own loss functions, for stacks whose trainer needs Ray.

A rollout batch of eight responses in groups of four is trained in windows, once or twice. The stack gives the loss of a
micro-batch, and advantages where it has a function for them; model, log-probabilities, micro-batches and steps are
this file's. So an audit by it says that the functions compute what they should, and nothing of the trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ._shared import optimizer, policy_case

GROUP = 4
NOISE = 0.4
"""Size of the sampler's deviation, nats."""


def loop_case(name: str, asked: str, policy: dict, lr: float = 0.3, **options: Any) -> dict:
    """A case: what is asked, by hand from the stack's documentation, and the options of its functions."""
    made = policy_case(f"RL: {name}", asked, 2, 2, 1, policy=policy, **options)
    return made | {"epochs": 2, "steps": 4, "lr": lr}


def drive(
    case: dict,
    session: Any,
    policy: dict,
    advantages_of: Callable[[Any, Any], Any],
    loss_of: Callable[[dict, dict], Any],
) -> None:
    """Take the steps of a case.

    Args:
        policy: what is asked, but for the normaliser, which is the case's.
        advantages_of: (rewards, mask of response tokens), shape (8,) and (8, T) -> advantages, shape (8, T).
        loss_of: (tensors of a micro-batch, shape (rows, T) each: log_prob, old, reference, sampler, advantages, mask;
            ``tokens`` and ``rows`` of the whole step and ``micro_batches`` of it) -> its loss, to be added up.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if case["ranks"] > 1:
        session.skip("the loop around the loss functions has one rank")
    model = AutoModelForCausalLM.from_pretrained(session.model).float()
    model.config.use_cache = False
    rows, temperature = session.rows()[: case["examples"]], policy.get("temperature", 1.0)
    batch = _padded(rows)
    rewards = torch.tensor([(0.0, 1.0, 0.25, 2.0)[i % GROUP] * (1.0 + 0.5 * (i // GROUP)) for i in range(len(rows))])
    optim = optimizer(case, model.parameters())
    with torch.no_grad():
        reference = _logps(model, batch, range(len(rows)), temperature)
    wave = [[NOISE * math.sin(1.7 * t + i) for t in range(reference.shape[1])] for i in range(len(rows))]
    sampler = reference + torch.tensor(wave) if case["options"].get("sampler") else reference
    session.say(policy=policy | {"normaliser": case["asked"]}, versions=[0] * case["steps"])
    _say(case, session, batch, rewards, sampler)
    facts = {"reference": reference, "sampler": sampler, "old": reference, "mask": batch["mask"]}
    facts["advantages"] = advantages_of(rewards, batch["mask"])
    session.watch(model)
    session.parameters(model)
    window, micro = case["micro_batch"] * case["accumulation"], case["micro_batch"]
    for _ in range(case["epochs"]):
        for start in range(0, len(rows) - window + 1, window):
            chosen = range(start, start + window)
            totals = {
                "tokens": int(batch["mask"][list(chosen)].sum()), "rows": window, "micro_batches": window // micro,
            }  # fmt: skip
            optim.zero_grad()
            for first in range(start, start + window, micro):
                own = list(range(first, first + micro))
                tensors = {name: value[own] for name, value in facts.items()}
                tensors["log_prob"] = _logps(model, batch, own, temperature)
                loss_of(tensors, totals).backward()
            optim.step()
            if session.stepped(model):
                return


def _padded(rows: list[dict]) -> dict[str, Any]:
    """Rows padded on the right, and the mask of their response tokens as targets, shape (rows, longest - 1)."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, filler: int) -> Any:
        return torch.tensor([[*row[name], *[filler] * (longest - len(row[name]))] for row in rows])

    labels = filled("labels", -100)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    attention = (torch.arange(longest)[None] < lengths[:, None]).long()
    return {"input_ids": filled("input_ids", 0), "attention_mask": attention, "mask": (labels[:, 1:] != -100).float()}


def _logps(model: Any, batch: dict[str, Any], chosen: Any, temperature: float) -> Any:
    own = list(chosen)
    ids, attention = batch["input_ids"][own], batch["attention_mask"][own]
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1].float() / temperature
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]


def _say(case: dict, session: Any, batch: dict[str, Any], rewards: Any, sampler: Any) -> None:
    rollouts: list[dict] = [{"reward": reward, "group": i // GROUP} for i, reward in enumerate(rewards.tolist())]
    if case["options"].get("sampler"):
        for i, rollout in enumerate(rollouts):
            rollout["sampler"] = sampler[i][batch["mask"][i].bool()].tolist()
    session.say(rollouts=rollouts)

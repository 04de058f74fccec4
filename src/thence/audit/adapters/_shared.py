"""What several adapters need. Like them, it uses the standard library alone at import time."""

from __future__ import annotations

import os
import socket
import statistics
from collections.abc import Sequence
from typing import Any

RESUMED: dict[str, Any] = {
    "examples": 12,
    "epochs": 2,
    "steps": 5,
    "optimizer": "adamw",
    "lr": 0.01,
    "eps": 1e-2,
    "betas": (0.9, 0.95),
    "schedule": "linear",
    "beyond": "resume",
    "save_after": 2,
}
"""Fields of a case that resumes with windows of 4 rows: in the middle of an epoch, then over its edge. The epsilon is
about as large as a gradient, so that both moments of AdamW count and rounding is not blown up."""
SAVED: dict[str, Any] = {"steps": 2, "lr": 0.1, "beyond": "saved"}
EVALUATED: dict[str, Any] = {"examples": 7, "lr": 0.1, "beyond": "evaluation"}
"""Seven rows in batches of two: the last batch is not full, which tells means of batches apart."""


def policy_case(name: str, asked: str, micro: int = 2, accumulation: int = 4, ranks: int = 1, **options: Any) -> dict:
    """A case of an objective that the options choose."""
    return {
        "name": name,
        "micro_batch": micro,
        "accumulation": accumulation,
        "ranks": ranks,
        "asked": asked,
        "options": options,
    }


def rewards(size: int) -> list[float]:
    """Rewards whose advantages are far from zero in groups of 2, 4 and 8, with other means and spreads by group."""
    pattern = (-3.0, -1.0, 1.5, 2.5)
    return [2.0 + i // 4 + pattern[i % 4] * (1.0 + 0.5 * (i // 4)) for i in range(size)]


def advantages(rewards: Sequence[float], size: int, scale: str, eps: float, batch: int | None = None) -> list[float]:
    """Reward minus the group's mean, over a standard deviation (with Bessel's correction) plus ``eps``.

    Args:
        size: rows of a group.
        scale: whose deviation: ``group``, ``batch`` or ``none``.
        batch: rows of a batch; None: all.
    """
    result = []
    batch = batch or len(rewards)
    for start in range(0, len(rewards), size):
        group = rewards[start : start + size]
        whole = rewards[start // batch * batch :][:batch]
        spread = 1.0 if scale == "none" else statistics.stdev(group if scale == "group" else whole) + eps
        result += [(reward - statistics.fmean(group)) / spread for reward in group]
    return result


def optimizer(case: dict, parameters: Any) -> Any:
    """torch's SGD or AdamW, as the case says."""
    import torch

    if case["optimizer"] == "adamw":
        betas = tuple(case["betas"])
        return torch.optim.AdamW(parameters, lr=case["lr"], betas=betas, eps=case["eps"], weight_decay=0.0)
    return torch.optim.SGD(parameters, lr=case["lr"])


def all_steps(case: dict) -> int:
    """Optimizer steps of all epochs of a case: those of its schedule, though it may stop earlier."""
    window = case["micro_batch"] * case["accumulation"] * case["ranks"]
    return case["epochs"] * -(-case["examples"] // window)


def schedule(case: dict, optimizer: Any) -> Any:
    """torch's schedule of the learning rate, as the case says: linear to zero after the last step, or constant."""
    import torch

    steps = all_steps(case)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: max(0.0, 1 - done / steps) if case["schedule"] == "linear" else 1.0
    )


def join_alone() -> None:
    """Set the variables of a world of one rank, for stacks that want a process group even then."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])

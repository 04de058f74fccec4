"""Group advantages: how much better a response was than its group.

Sources: GRPO (arXiv 2402.03300), Dr. GRPO (arXiv 2503.20783).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

STD_EPS = 1e-6


def group_advantages(
    reward_N: Tensor,
    group_N: Tensor,
    *,
    std: bool = False,
    baseline: Literal["joint", "on-policy"] = "joint",
    on_policy_N: Tensor | None = None,
    singleton: Literal["zero", "reward"] = "reward",
) -> Tensor:
    """A_i = R_i - mean of the group, divided by (std + 1e-6) when asked.

    Args:
        reward_N: one reward a response, shape (N,), float.
        group_N: the group (prompt) of each response, shape (N,), integers.
        std: divide by the group's unbiased standard deviation plus 1e-6.
        baseline: ``joint``: mean and std over the whole group. ``on-policy``: over its on-policy members only, while
            every member gets an advantage against it.
        on_policy_N: which responses were sampled from the policy, shape (N,), bool; all when absent.
        singleton: what a response that is alone in its baseline gets: ``reward`` (its own reward: mean 0 and std 1)
            or ``zero``.

    Returns:
        Advantages, shape (N,), detached, in the dtype of the rewards.

    Raises:
        ValueError: ``on-policy`` without ``on_policy_N``.
    """
    member_N = torch.ones_like(group_N, dtype=torch.bool)
    if baseline == "on-policy":
        if on_policy_N is None:
            raise ValueError("baseline 'on-policy' needs on_policy_N")
        member_N = on_policy_N
    _, index_N = torch.unique(group_N, return_inverse=True)
    groups = int(index_N.max()) + 1 if len(index_N) else 0
    weight_N = member_N.to(reward_N.dtype)
    zeros_G = torch.zeros(groups, dtype=reward_N.dtype, device=reward_N.device)
    size_G = zeros_G.index_add(0, index_N, weight_N)
    mean_G = zeros_G.index_add(0, index_N, weight_N * reward_N) / size_G.clamp(min=1)
    centred_N = reward_N - mean_G[index_N]
    # A group whose rewards are all equal has advantage exactly zero; rounding of the mean must not say otherwise.
    low_G = zeros_G.scatter_reduce(0, index_N, reward_N, "amin", include_self=False)
    high_G = zeros_G.scatter_reduce(0, index_N, reward_N, "amax", include_self=False)
    centred_N = torch.where((low_G == high_G)[index_N], torch.zeros_like(centred_N), centred_N)
    if std:
        variance_G = zeros_G.index_add(0, index_N, weight_N * (reward_N - mean_G[index_N]).square())
        deviation_G = (variance_G / (size_G - 1).clamp(min=1)).sqrt()
        centred_N = centred_N / (deviation_G[index_N] + STD_EPS)
    alone_N = size_G[index_N] <= 1
    single_N = reward_N if singleton == "reward" else torch.zeros_like(reward_N)
    return torch.where(alone_N, single_N, centred_N).detach()

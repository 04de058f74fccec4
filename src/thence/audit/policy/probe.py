"""Facts of rollouts that let every part of a policy objective show: what adapters and ``check_policy`` hand out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

LENGTHS = (2, 13, 3, 9, 5, 12, 8, 4, 17, 6, 11, 3)
"""Response tokens of twelve rollouts: no two groups and no two micro-batches of 2, 4 or 6 hold equally many."""
GROUP = 3
"""Rollouts of a group: small, so that n and n - 1 are far apart."""
NOISE = 0.15
"""Standard deviation of what sets the sampling engine's log-probabilities apart from the trainer's, nats."""
_REWARDS = ((1.0, 0.0, 0.3), (0.0, 0.7, 1.0), (0.5, 0.5, 0.5), (1.0, 0.2, 0.0))
"""Of one group after the other: other means and spreads, and one group of equal rewards."""


def rollout_facts(lengths: Sequence[int], seed: int = 0, group: int = GROUP) -> list[dict[str, Any]]:
    """``reward``, ``group``, ``truncated``, ``environment`` and ``noise`` of rollouts with so many response tokens.

    Two responses are cut at the length limit, two hold tokens of the environment, and one group in four has equal
    rewards. The policy's log-probabilities plus ``noise`` (one number a token) are those of a sampler that differs.

    Args:
        group: rollouts of one group, neighbours.
    """
    draw = random.Random(seed)
    long = [i for i, length in enumerate(lengths) if length >= 6]
    with_tools = set(long[::3][:2])
    truncated = set([i for i in range(len(lengths)) if i not in with_tools and lengths[i] > 2][::4][:2])
    facts = []
    for i, length in enumerate(lengths):
        rewards = _REWARDS[i // group % len(_REWARDS)]
        flat = len(set(rewards)) == 1
        reward = rewards[i % group % len(rewards)] + (0.0 if flat else 0.1 * (i % group // len(rewards)))
        facts.append(
            {
                "reward": reward,
                "group": i // group,
                "truncated": i in truncated,
                "environment": [2, 3] if i in with_tools else [],
                "noise": [draw.gauss(0.0, NOISE) for _ in range(length)],
            }
        )
    return facts

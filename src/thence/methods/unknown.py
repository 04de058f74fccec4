"""Responses that nobody can judge: a grader's time-out, no gold answer that it can read, a reward function's None.

Unknown is not wrong. Such a response has no score (``None``), and no method takes it for a reward of zero:

* Gates look at the others: a group has failed when all rewards that are known are zero, and at least one is known. A
  group without a known reward has neither failed nor succeeded.
* Before weights are given, :func:`leave_out` drops it: it is in no group, no advantage and no normaliser.

A stage with ``unknown = "zero"`` gives it the score 0.0 instead, and nothing of this happens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from thence.data.trajectory import Trajectory
from thence.methods.base import Method


def scores_of(group: Sequence[Trajectory]) -> list[float]:
    """The rewards that are known."""
    return [trajectory.score for trajectory in group if trajectory.score is not None]


def all_failed(group: Sequence[Trajectory]) -> bool:
    """Whether no known reward is above zero, and one is known at least."""
    scores = scores_of(group)
    return bool(scores) and max(scores) <= 0


def leave_out(method: Method, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """The trajectories that a method can give weights to, in their order.

    Those whose reward the method needs and nobody knows are dropped. Where that leaves a single reward in a prompt's
    baseline, or none, the rest of the prompt's rewarded trajectories goes too: there is nothing to compare them with,
    and a lone response's rule is for stages that sample one a prompt on purpose. A demonstration that is learned
    whatever its reward stays.
    """
    unknown = {t.prompt.group_key for t in trajectories if t.score is None and method.rewarded(t)}
    if not unknown:
        return list(trajectories)
    kept = [t for t in trajectories if t.score is not None or not method.rewarded(t)]
    left = Counter(t.prompt.group_key for t in kept if method.compared(t))
    return [
        t for t in kept if t.prompt.group_key not in unknown or left[t.prompt.group_key] > 1 or not method.rewarded(t)
    ]

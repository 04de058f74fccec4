"""What is known of a case that was run: parameters around its steps, and the rows that they were taken on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from thence.audit.policy.facts import Rollout
from thence.audit.policy.objective import PolicyObjective
from thence.audit.policy.read import PolicyFacts
from thence.audit.solve.observation import ForwardRow
from thence.audit.solve.sequences import Piece

UNEXPLAINED = "unexplained"
"""What the reason says where token weights do not make up the update."""


class NotJudged(Exception):
    """A step that cannot be judged; the message says why."""


@dataclass(frozen=True)
class OptimizerStep:
    """What was seen of the optimizers while one step was taken, through torch's hooks around ``Optimizer.step``.

    Args:
        names: classes of the optimizers, each once.
        gradients: of every parameter when its optimizer was called first, by name.
        calls: most times that the optimizer of one parameter was called.
        alone: whether nothing but these calls moved the parameters, and every one that moved had a gradient.
    """

    names: tuple[str, ...]
    gradients: Mapping[str, Tensor]
    calls: int
    alone: bool

    @property
    def whole(self) -> bool:
        """Whether one call of the optimizer is all that moved every parameter."""
        return self.alone and self.calls == 1

    @property
    def name(self) -> str:
        """The optimizers in words."""
        return " and ".join(self.names)


@dataclass(frozen=True)
class Evidence:
    """What is known of a case that was run.

    Args:
        states: parameters before the first step and after each, by name.
        rows: that went forward in each step, where they were watched; else
        pieces: of each step as planned.
        advantages: one factor an example, for policy-gradient losses; None: supervised.
        longest: constant of a constant divisor, tokens; 0: not known.
        lr: learning rate, where it is not the case's.
        scale_known: False where learning rate or optimizer are not known.
        frozen: parameters that are not meant to be trained, by name.
        seen: of the optimizers, where they were watched (one step).
        unseen: what such evidence does not show, a line each.
        policy: the objective asked for, of reinforcement learning; None: ``advantages`` alone, or supervised.
        facts: of its rollouts, with ``policy``.
    """

    states: Sequence[Mapping[str, Tensor]]
    rows: Sequence[Sequence[ForwardRow]] | None = None
    pieces: Sequence[Sequence[Piece]] | None = None
    advantages: Sequence[float] | None = None
    longest: float = 0.0
    lr: float | None = None
    scale_known: bool = True
    frozen: frozenset[str] = frozenset()
    seen: OptimizerStep | None = None
    unseen: tuple[str, ...] = ()
    policy: PolicyObjective | None = None
    facts: PolicyFacts | None = None


def said_policy(said: Mapping[str, Any]) -> tuple[PolicyObjective, PolicyFacts] | None:
    """The policy objective and its facts, as an adapter said them; None: it said no ``policy``.

    Args:
        said: ``policy`` (settings of ``PolicyObjective``), ``rollouts`` (facts of ``Rollout``, one an example),
            ``versions`` (one number a step), ``reference`` (a number) and ``samplers`` (log-probabilities of the
            sampling engine, of each step and example, where they change).

    Raises:
        UserError: an unknown setting or fact.
    """
    if said.get("policy") is None:
        return None
    rollouts = tuple(Rollout.of(rollout) for rollout in said.get("rollouts", ()))
    samplers = tuple(tuple(map(tuple, step)) for step in said.get("samplers", ()))
    facts = PolicyFacts(rollouts, tuple(said.get("versions", ())), int(said.get("reference", 0)), samplers)
    return PolicyObjective.of(said["policy"]), facts

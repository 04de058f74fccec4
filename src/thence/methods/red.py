"""RED (arXiv 2508.16677): GRPO and SFT in every step, with an SFT weight that follows the changes of two entropies.

    L = - (1 / Z) sum_own min(r A_i, clip(r, 0.8, 1.2) A_i) - (1 / Z_sft) sum_expert v_i log pi(y*_t) - eta * entropy
    v_i = coefficient * w * G^(1 - 2 acc_i),   A_i = (R_i - mean) / (std + 1e-6) over the prompt's own rollouts
    w   = clip( |dH_sft| / (|dH_rl| + 1e-8), 1, G ),   acc_i = mean score of the prompt's own rollouts

dH_sft and dH_rl are the changes, since the optimizer step before, of the policy's mean entropy on expert and on own
tokens; ``smoothing`` makes exponential moving averages of both first. In the first step there is no change and w = 1.

A prompt with a demonstration has n - 1 rollouts and the demonstration; one without has n rollouts. Where nobody can
judge the rollouts, acc is not known and G^(1 - 2 acc) is 1.

Reconstruction. The paper gives the offline tokens an importance weight whose assumed behaviour probability follows from
the group's accuracy; its equations 7 to 9 were not available. What stands here for it, the factor G^(1 - 2 acc), and
G = 5, coefficient = 0.1 and smoothing = 0.99 are those of a port by others; that the demonstration takes the place of
one rollout was chosen here. Entropies are those of the rows of the optimizer step, over all ranks, before it.
``paper`` normalises as ``clean`` does, for no other is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field
from torch import Tensor

from thence.data.trajectory import Trajectory
from thence.methods.base import TokenFacts, Weights, reward_of, switched_on
from thence.methods.mixed import (
    ClippedOptions,
    WithDemonstration,
    advantages,
    entropy_term,
    likelihood_normaliser,
    policy_normaliser,
)
from thence.objective import Clip, Logp, Term
from thence.settings.limits import Coefficient, PartShare


class RedOptions(ClippedOptions):
    """Settings of RED."""

    coefficient: Coefficient = 0.1
    """Coefficient of the demonstrations' likelihood, before the two factors."""
    largest: float = Field(default=5.0, ge=1, le=1e6)
    """G: largest value of each of the two factors."""
    smoothing: PartShare = 0.99
    """Decay of the moving averages of both entropies. 0: no averages."""


class Red(WithDemonstration):
    """Policy gradient and likelihood of demonstrations, balanced by how fast either changes the entropy."""

    name = "red"
    formula = "-(1/N) sum_own min(r A, clip(r) A) - (0.1/N) sum_expert w G^(1 - 2 acc) log pi, w = |dH_sft|/|dH_rl|"
    source = "arXiv 2508.16677 at second hand, and a port of it"
    exactness = "reconstruction"
    uses_facts = True
    not_ahead = ""
    Options = RedOptions

    def __init__(self, options: Mapping[str, Any] | None = None):
        super().__init__(options)
        self.entropies: dict[str, float] = {}
        """Averages before the current optimizer step, of ``own`` and ``expert`` tokens."""
        self.weighed: dict[str, float] = {}
        """The same after it."""

    @property
    def terms(self) -> tuple[Term, ...]:
        o = self.options
        policy = Term("policy", Clip(o.clip_low, o.clip_high), policy_normaliser(o))
        return (policy, Term("sft", Logp(), likelihood_normaliser(o)), *entropy_term(o))

    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Weights]:
        o = self.options
        self.weighed = self.averages(trajectories, facts)
        before, after = self.entropies, self.weighed
        balance = 1.0
        if len(before) == 2:
            changes = (after[kind] - before[kind] for kind in ("expert", "own"))
            balance = entropy_weight(*changes, largest=o.largest)
        accuracy = own_accuracy(trajectories)
        weights = []
        for trajectory, advantage in zip(trajectories, advantages(trajectories, o.std, own_only=True), strict=True):
            factor = accuracy_factor(accuracy.get(trajectory.prompt.group_key, 0.5), o.largest)
            expert = trajectory.origin == "demonstration"
            policy, sft = (0.0, o.coefficient * balance * factor) if expert else (float(advantage), 0.0)
            weights.append({"policy": policy, "sft": sft, **switched_on(entropy=o.entropy)})
        return weights

    def averages(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts]) -> dict[str, float]:
        """The moving averages with this optimizer step's entropies in them; kinds without a token stay as they were."""
        found = dict(self.entropies)
        entropies: dict[str, list[Tensor]] = {"own": [], "expert": []}
        for trajectory, fact in zip(trajectories, facts, strict=True):
            entropies["expert" if trajectory.origin == "demonstration" else "own"].append(fact.entropy.double())
        mine = {k: (sum(float(part.sum()) for part in p), sum(len(part) for part in p)) for k, p in entropies.items()}
        ranks = self.sampler.gather(mine) if self.sampler is not None else [mine]
        for kind in entropies:
            tokens = sum(rank[kind][1] for rank in ranks)
            if tokens:
                mean = sum(rank[kind][0] for rank in ranks) / tokens
                decay = self.options.smoothing if kind in found else 0.0
                found[kind] = decay * found.get(kind, 0.0) + (1 - decay) * mean
        return found

    def took_step(self, kind: str, grad_norm: float) -> None:
        self.entropies = self.weighed

    def state(self) -> dict[str, Any]:
        return {"entropies": self.entropies}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.entropies = dict(state["entropies"])


def entropy_weight(expert_change: float, own_change: float, largest: float = 5.0) -> float:
    """w: how much faster the entropy of expert tokens changes than that of own tokens, between 1 and ``largest``."""
    return min(max(abs(expert_change) / (abs(own_change) + 1e-8), 1.0), largest)


def accuracy_factor(accuracy: float, largest: float = 5.0) -> float:
    """From ``largest``, where the policy never succeeds, down to its inverse, where it always does."""
    return largest ** (1 - 2 * accuracy)


def own_accuracy(trajectories: Sequence[Trajectory]) -> dict[tuple[int, int], float]:
    """Mean score of the rollouts of every prompt that has some of a known reward, by the prompt's index and draw."""
    scores: dict[tuple[int, int], list[float]] = {}
    for trajectory in trajectories:
        if trajectory.origin != "demonstration":
            scores.setdefault(trajectory.prompt.group_key, []).append(reward_of(trajectory))
    return {index: sum(own) / len(own) for index, own in scores.items()}

"""One optimizer step of a policy, ready for hypotheses: its facts, its update, and what an objective predicts of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from thence.audit.policy.facts import PolicyStep
from thence.audit.policy.objective import PolicyObjective
from thence.audit.policy.predict import Overrides, beside_weights, edges, token_weights
from thence.audit.policy.system import Distance, UpdateSystem

NO_OVERRIDES = Overrides()


@dataclass(frozen=True)
class Variant:
    """An objective on a step, perhaps with a mistake that no objective says.

    Args:
        factor: of all weights: a number, or one a token, shape (T,).
        also: roles outside the response that are trained too, with any weights.
    """

    step: PolicyStep
    asked: PolicyObjective
    other: Overrides = NO_OVERRIDES
    factor: float | np.ndarray = 1.0
    also: tuple[str, ...] = ()

    def weights(self) -> np.ndarray:
        """Of the response tokens, shape (T,)."""
        return self.factor * token_weights(self.step, self.asked, self.other)


@dataclass(frozen=True)
class Observed:
    """One optimizer step, and its update.

    Args:
        index: 1 for the first.
        width: distance of a log-ratio from a bound within which rounding decides on which side it lies.
        system: over the gradients of the tokens.
        roles: of the columns of the system, shape (columns,).
        widened: makes the system that has the gradients of every token's entropy and of its exact KL to the reference,
            or its divergence from the teacher, behind the others, T columns each.
        padded: makes this step with the gradients of padding as targets, without a role in the response: padding masked
            from attention, and not; empty: there is none.
        leaked: makes the system in which gradients of earlier steps may have any factor; None: there are none.
        at_temperature: temperature -> that temperature's log-probabilities, and the distance of the update from what
            weights, shape (T,), would give at that temperature.
    """

    index: int
    width: float
    step: PolicyStep
    system: UpdateSystem
    roles: np.ndarray
    widened: Callable[[], UpdateSystem]
    leaked: Callable[[], UpdateSystem] | None
    at_temperature: Callable[[float], tuple[PolicyStep, Callable[[np.ndarray], Distance]]]
    padded: Callable[[], Sequence[Observed]] = tuple
    _wide: list[UpdateSystem] = field(default_factory=list)

    def wide(self) -> UpdateSystem:
        """The widened system, made once."""
        if not self._wide:
            self._wide.append(self.widened())
        return self._wide[0]

    def distance(self, variant: Variant) -> Distance:
        """Of the update from what a variant of this step would give."""
        near = edges(variant.step, variant.asked, self.width, variant.other)
        system, spread = self.spread(variant)
        free = np.zeros(system.count, bool)
        free[system.column[near]] = True
        if variant.also:
            free[: len(self.roles)] |= np.isin(self.roles, variant.also)
        return system.distance(spread, free)

    def spread(self, variant: Variant) -> tuple[UpdateSystem, np.ndarray]:
        """The system that can say a variant of this step, and its weights of the columns there, shape (columns,)."""
        asked, weights = variant.asked, variant.weights()
        whole = (asked.exact and asked.kl) or asked.demonstration == "raised" or asked.divergence != "none"
        system = self.wide() if asked.entropy or whole else self.system
        spread = system.spread(weights)
        if system is not self.system:
            entropy, exact = (
                np.asarray(variant.factor) * w for w in beside_weights(variant.step, asked, variant.other)
            )
            spread[-2 * len(weights) :] += np.concatenate([entropy, exact])
        return system, spread

    def fits(self, variant: Variant) -> bool:
        """Whether the update is the one that a variant would give."""
        return self.distance(variant).share <= self.system.tolerance


def worst(observed: Sequence[Observed], variants: Sequence[Variant]) -> float:
    """Largest distance of any step from its variant, over what is allowed; up to 1 all fit."""
    pairs = zip(observed, variants, strict=True)
    return max((o.distance(v).share / o.system.tolerance for o, v in pairs), default=0.0)

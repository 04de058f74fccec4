"""What a rollout batch of a method samples and trains, in responses: where outcomes decide, between two bounds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """One outcome of a rollout batch, in responses of mean length; a part of one counts as that part.

    Args:
        sampled: responses that the policy samples.
        trained: of them, or of earlier ones, those that are trained.
        demonstrations: demonstrations, or parts of them, that are trained.
    """

    sampled: float
    trained: float
    demonstrations: float = 0.0


@dataclass(frozen=True, slots=True)
class Work:
    """The cheapest and the dearest outcome of a rollout batch.

    Args:
        least, most: the outcomes.
        depends: on what it depends which one comes true; empty where both are the same.
        at_once: prompts that are sampled at once, where these are not those of the batch.
    """

    least: Outcome
    most: Outcome
    depends: str = ""
    at_once: int | None = None

    @classmethod
    def just(cls, outcome: Outcome) -> Work:
        """The same whatever happens."""
        return cls(outcome, outcome)

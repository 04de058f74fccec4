"""What the batch of a step must hold for a fault of reinforcement learning to mean anything at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from thence.objective import Batch, Clip, NegativeKl, Row, Term, is_penalty


@dataclass(frozen=True)
class Feature:
    """Something that a batch has or lacks.

    Args:
        words: what is lacking, for a message.
        of_batch: whether a batch has it.
        of_stage: whether the batches of a recipe's RL stage have it, as far as its settings tell.
    """

    words: str
    of_batch: Callable[[Batch], bool]
    of_stage: Callable[[Any], bool] = lambda stage: True


def policy_term(batch: Batch) -> int:
    """The place of the term that has the advantages.

    Raises:
        ValueError: there is none, or several; :data:`ROLLOUTS` says so before.
    """
    (place,) = (j for j, term in enumerate(batch.terms) if not is_penalty(term))
    return place


def kl_term(batch: Batch) -> int | None:
    """The place of the KL term; None: there is none."""
    return next((j for j, term in enumerate(batch.terms) if isinstance(term.surrogate, NegativeKl)), None)


def _policy(batch: Batch) -> Term:
    return batch.terms[policy_term(batch)]


def _has_rollouts(batch: Batch) -> bool:
    policies = [term for term in batch.terms if not is_penalty(term)]
    return len(policies) == 1 and all(row.sampled is not None for row in batch.rows)


def _is_whole(batch: Batch) -> bool:
    """Whether the rows are those of whole generation batches."""
    found: dict[int, set[int]] = {}
    sizes: dict[int, int] = {}
    for row in batch.rows:
        if row.sampled is None:
            return False
        key = id(row.sampled.generation)
        found.setdefault(key, set()).add(row.sampled.place)
        sizes[key] = len(row.sampled.generation.rewards)
    return all(len(places) == sizes[key] for key, places in found.items())


def _clips(batch: Batch, test: Callable[[Clip], bool]) -> bool:
    surrogate = _policy(batch).surrogate
    return isinstance(surrogate, Clip) and test(surrogate)


def _all(batch: Batch, test: Callable[[Row], bool]) -> bool:
    return all(test(row) for row in batch.rows)


def _steps_on_one(stage: Any) -> bool:
    return bool(stage.mini_batch and stage.mini_batch < stage.prompts)


_CLIPPED = ("grpo", "dapo", "dr_grpo")
"""Methods whose policy term is a clipped ratio of tokens."""
ROLLOUTS = Feature(
    "responses with known rewards and groups, and one policy term (the GRPO family)",
    _has_rollouts,
    lambda stage: stage.method in (*_CLIPPED, "gspo", "cispo", "dppo", "ipo"),
)
CLIP = Feature(
    "a clipped ratio of tokens", lambda batch: _clips(batch, lambda clip: True), lambda stage: stage.method in _CLIPPED
)
CLIP_HIGHER = Feature(
    "a clip range that is wider above one than below",
    lambda batch: _clips(batch, lambda clip: clip.high > clip.low),
)
DUAL_CLIP = Feature("a dual clip", lambda batch: _clips(batch, lambda clip: clip.dual < math.inf))
SEQUENCE_RATIO = Feature(
    "a ratio of whole responses (GSPO)",
    lambda batch: _all(batch, lambda row: row.sampled is not None and row.sampled.generation.sequence_ratio),
    lambda stage: stage.method == "gspo",
)
MOVED = Feature("several optimizer steps on one rollout batch", lambda batch: True, _steps_on_one)
STD = Feature(
    "advantages divided by the group's standard deviation",
    lambda batch: _all(batch, lambda row: row.sampled is not None and row.sampled.generation.std),
)
TOKENS = Feature(
    "a normaliser that counts tokens", lambda batch: all(term.normaliser.of == "tokens" for term in batch.terms)
)
KL = Feature("a KL term", lambda batch: kl_term(batch) is not None)
NO_KL = Feature("no KL term, whose reference is scored at the temperature", lambda batch: kl_term(batch) is None)
K3 = Feature(
    "a KL term with the estimator k3",
    lambda batch: any(
        isinstance(term.surrogate, NegativeKl) and term.surrogate.estimator == "k3" for term in batch.terms
    ),
)
WHOLE = Feature("the whole rollout batch in one step", _is_whole, lambda stage: not _steps_on_one(stage))
TEMPERATURE = Feature(
    "a sampling temperature other than 1",
    lambda batch: batch.temperature != 1.0,
    lambda stage: stage.temperature != 1.0,
)
IMPORTANCE = Feature(
    "importance weights against the sampler (importance_bound)",
    lambda batch: _all(batch, lambda row: row.sampled is not None and row.sampled.trust is not None),
    lambda stage: stage.importance_bound is not None,
)
MASKED = Feature(
    "truncated responses that are masked, which no method of thence does",
    lambda batch: _all(batch, lambda row: row.sampled is None or not row.sampled.truncated or not row.n_trained),
    lambda stage: False,
)
ENVIRONMENT = Feature(
    "tokens of tools or environments in the responses (environment)",
    lambda batch: True,
    lambda stage: stage.environment is not None,
)
UNINFORMATIVE = Feature(
    "groups of equal rewards that are left out of the count; thence leaves them out of the batch",
    lambda batch: True,
    lambda stage: False,
)

"""Terms and their normalisers: the shape that every method gives to the one objective

L(theta) = - sum over tokens t, terms j of  weight[t, j] * S_j(t; theta) / Z_j
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thence.objective.sampled import Sampled
from thence.objective.surrogates import Clip, Entropy, NegativeKl, Ratio, RefCE, ShapeRatio, Surrogate
from thence.objective.trust import CappedRatio, SquaredGap, TrustMask


@dataclass(frozen=True)
class Normaliser:
    """Z of a term: a count over the whole optimizer step, all micro-batches and all ranks, times a constant.

    Args:
        of: ``tokens``: trained tokens of every row; ``term tokens``: those to which this term gives a weight;
            ``sequences``: rows; ``one``: no count.
        times: the constant factor (Dr. GRPO: the longest response).
    """

    of: Literal["tokens", "term tokens", "sequences", "one"] = "tokens"
    times: float = 1.0


@dataclass(frozen=True)
class Term:
    """A surrogate, the normaliser of its weighted sum, and a name for the log."""

    name: str
    surrogate: Surrogate
    normaliser: Normaliser = Normaliser()


@dataclass(frozen=True)
class BareRow:
    """What the model reads of a trajectory: enough to measure log-probabilities, not to train on.

    Args:
        token_ids: prompt and response, shape (L,), int64.
        trained: which tokens are trained, shape (L,), bool; the first is False, since nothing predicts it.
    """

    token_ids: Tensor
    trained: Tensor

    @property
    def n_trained(self) -> int:
        """Number of trained tokens."""
        return int(self.trained.sum())


@dataclass(frozen=True)
class Row(BareRow):
    """A trajectory made ready for the step.

    Args:
        token_ids, trained: see :class:`BareRow`.
        weights: one row a term, shape (J, n) with n trained tokens; detached, any sign.
        behaviour: log-probabilities of the trained tokens under the behaviour policy, shape (n,), or None where the
            policy has not moved since sampling.
        reference: the same under the reference policy of a KL term.
        sampled: how its response came about, for faults; no step looks at it.
        shown: what a teacher reads in place of the row: the same trained tokens behind another prompt. None: no
            teacher reads it, and no Divergence term has a weight on it.
    """

    weights: Tensor
    behaviour: Tensor | None = None
    reference: Tensor | None = None
    sampled: Sampled | None = None
    shown: BareRow | None = None

    @property
    def n_trained(self) -> int:
        """Number of trained tokens."""
        return self.weights.shape[1]


@dataclass(frozen=True)
class Batch:
    """What one optimizer step trains on: rows, the terms of their weights, and the temperature of the policy."""

    terms: tuple[Term, ...]
    rows: tuple[Row, ...]
    temperature: float = 1.0


def trained_tokens(prompt_length: int, length: int, train_on: str = "response") -> Tensor:
    """The mask of trained tokens: the response, or everything but the first token. Shape (L,), bool."""
    mask = torch.ones(length, dtype=torch.bool)
    mask[: max(1, prompt_length) if train_on == "response" else 1] = False
    return mask


def local_counts(batch: Batch) -> list[int]:
    """This rank's share of every count that a normaliser may need: trained tokens, rows, then tokens per term."""
    per_term = torch.zeros(len(batch.terms), dtype=torch.int64)
    for row in batch.rows:
        per_term += (row.weights != 0).sum(1).cpu()
    return [sum(row.n_trained for row in batch.rows), len(batch.rows), *per_term.tolist()]


def divisors(terms: Sequence[Term], counts: Sequence[int]) -> list[float]:
    """Z of every term from the counts summed over ranks. A count of zero gives 1: the weighted sum is empty too."""
    tokens, sequences, *per_term = counts
    result = []
    for term, own in zip(terms, per_term, strict=True):
        count = {"tokens": tokens, "term tokens": own, "sequences": sequences, "one": 1}[term.normaliser.of]
        result.append(max(count, 1) * term.normaliser.times)
    return result


def needs_behaviour(terms: Sequence[Term]) -> bool:
    """Whether any term's surrogate is a ratio to the behaviour policy."""
    ratios = Ratio | Clip | ShapeRatio | CappedRatio | TrustMask | SquaredGap
    return any(isinstance(term.surrogate, ratios) for term in terms)


def is_penalty(term: Term) -> bool:
    """Whether a term holds the policy where it is (KL, entropy, a squared gap) rather than teach it a reward."""
    return isinstance(term.surrogate, NegativeKl | Entropy | SquaredGap | RefCE)


def needs_reference(terms: Sequence[Term]) -> bool:
    """Whether any term's surrogate is a KL to the reference policy."""
    return any(isinstance(term.surrogate, NegativeKl) for term in terms)

"""Distances between whole next-token distributions that a policy objective may ask for, by plain formulas."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from thence.audit.policy.objective import PolicyObjective

Measure = Callable[[Tensor, Tensor], Tensor]
"""From log-probabilities of the policy and of another model, shape (T, vocabulary), to a distance, shape (T,), nats."""


def measure_of(asked: PolicyObjective) -> Measure:
    """The divergence from a teacher, or else the exact KL to the reference; the policy comes first."""
    if asked.divergence == "none":
        return _forward if asked.forward else _reverse
    distance = {"reverse": _reverse, "forward": _forward, "jsd": _jsd(asked.mixture)}[asked.divergence]
    if not asked.likeliest:
        return distance
    return lambda own_TV, theirs_TV: distance(*_likeliest(own_TV, theirs_TV, asked.likeliest, asked.tail))


def _reverse(own_TV: Tensor, theirs_TV: Tensor) -> Tensor:
    return (own_TV.exp() * (own_TV - theirs_TV)).sum(-1)


def _forward(own_TV: Tensor, theirs_TV: Tensor) -> Tensor:
    return _reverse(theirs_TV, own_TV)


def _jsd(share: float) -> Measure:
    def distance(own_TV: Tensor, theirs_TV: Tensor) -> Tensor:
        mixed_TV = ((1 - share) * own_TV.exp() + share * theirs_TV.exp()).log()
        return (1 - share) * _reverse(own_TV, mixed_TV) + share * _reverse(theirs_TV, mixed_TV)

    return distance


def _likeliest(own_TV: Tensor, theirs_TV: Tensor, count: int, tail: bool) -> tuple[Tensor, Tensor]:
    """Both over the words that the policy finds likeliest, and the tail or nothing of the others."""
    words_TK = own_TV.topk(min(count, own_TV.shape[-1]), -1).indices
    kept_TV = torch.zeros_like(own_TV, dtype=torch.bool).scatter(-1, words_TK, True)

    def cut(logp_TV: Tensor) -> Tensor:
        logp_TK = logp_TV.gather(-1, words_TK)
        if not tail or kept_TV.all():
            return logp_TK.log_softmax(-1)
        rest_T = logp_TV.exp().masked_fill(kept_TV, 0.0).sum(-1).log()
        return torch.cat([logp_TK, rest_T[:, None]], -1)

    return cut(own_TV), cut(theirs_TV)

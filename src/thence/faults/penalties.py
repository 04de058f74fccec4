"""Faults of reinforcement learning in the KL and in the importance weights against the sampler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from thence.faults.cut import Change, PolicyFacts, Window
from thence.faults.features import kl_term, policy_term
from thence.faults.policy import advantaged, against, coefficients_of, facts_of, old_of, response_of
from thence.faults.weights import scaled
from thence.objective import NegativeKl, kl_estimate


def kl_by(estimator: str) -> Change:
    """Another estimator of the KL."""

    def change(window: Window, policy: PolicyFacts) -> Window:
        terms = tuple(
            replace(term, surrogate=NegativeKl(estimator)) if isinstance(term.surrogate, NegativeKl) else term
            for term in window.batch.terms
        )
        return replace(window, batch=replace(window.batch, terms=terms))

    return change


def kl_times(factor: float) -> Change:
    """The coefficient of the KL times a number."""

    def change(window: Window, policy: PolicyFacts) -> Window:
        batch = window.batch
        factor_J = torch.tensor(
            [factor if isinstance(term.surrogate, NegativeKl) else 1.0 for term in batch.terms], dtype=torch.float64
        )
        return replace(window, batch=scaled(batch, [factor_J] * len(batch.rows)))

    return change


def kl_to_old(window: Window, policy: PolicyFacts) -> Window:
    """The KL is to the policy that sampled, not to the reference."""
    rows = tuple(replace(row, reference=old_of(row, policy)) for row in window.batch.rows)
    return replace(window, batch=replace(window.batch, rows=rows))


def kl_in_reward(window: Window, policy: PolicyFacts) -> Window:
    """The KL is taken from the reward, before advantages are made, and is no term of the loss."""
    batch, k = window.batch, kl_term(window.batch)
    assert k is not None
    estimator = batch.terms[k].surrogate
    assert isinstance(estimator, NegativeKl)
    taken: dict[int, Tensor] = {}
    coefficient = float(coefficients_of(batch)[k])
    for row in batch.rows:
        sampled = facts_of(row)
        less = taken.setdefault(id(sampled.generation), torch.zeros_like(sampled.generation.rewards))
        assert row.reference is not None
        less[sampled.place] = (
            coefficient * kl_estimate(old_of(row, policy).double(), row.reference.double(), estimator.estimator).sum()
        )
    advantages = []
    for row in batch.rows:
        sampled = facts_of(row)
        generation = sampled.generation
        less = replace(generation, rewards=generation.rewards - taken[id(generation)])
        advantages.append(float(against(less, generation.groups)[sampled.place]))
    batch = advantaged(batch, advantages, policy)
    rows = tuple(replace(row, weights=torch.cat([row.weights[:k], row.weights[k + 1 :]])) for row in batch.rows)
    return replace(window, batch=replace(batch, terms=(*batch.terms[:k], *batch.terms[k + 1 :]), rows=rows))


def importance(weight_of: Callable[[Tensor, float], Tensor]) -> Change:
    """Other weights against the sampler.

    Args:
        weight_of: (trainer's probability over the sampler's, shape (n,); the bound) -> weights, shape (n,).
    """

    def change(window: Window, policy: PolicyFacts) -> Window:
        batch, j, rows = window.batch, policy_term(window.batch), []
        for row in window.batch.rows:
            sampled, trained = facts_of(row), response_of(row)
            assert sampled.trust is not None
            if sampled.sampler is None or not row.n_trained:
                rows.append(row)
                continue
            ratio = (old_of(row, policy).double() - sampled.sampler[trained].double()).exp()
            weights = row.weights.clone()
            weights[j] *= (weight_of(ratio, sampled.bound) / sampled.trust[trained].double()).to(weights)
            rows.append(replace(row, weights=weights))
        return replace(window, batch=replace(batch, rows=tuple(rows)))

    return change

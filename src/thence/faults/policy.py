"""Faults of reinforcement learning that change a batch: advantages, masks, ratio and clip, KL, importance weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thence.faults.cut import Change, PolicyFacts, Window
from thence.faults.features import policy_term
from thence.faults.weights import STD_EPS, is_share, means_of_groups, scaled
from thence.objective import Batch, Clip, Context, Generation, Logp, Ratio, Row, Sampled, Term
from thence.objective.surrogates import LOG_RATIO_LIMIT


@dataclass(frozen=True)
class ClipBothSides(Clip):
    """A ratio outside the range has no gradient, whatever the sign of the advantage."""

    def value(self, logp_T: Tensor, context: Context) -> Tensor:
        ratio_T = Ratio().value(logp_T, context)
        return torch.where(self.clipped(ratio_T.detach(), context), ratio_T.detach(), ratio_T)

    def clipped(self, ratio_T: Tensor, context: Context) -> Tensor:
        return (ratio_T > 1 + self.high) | (ratio_T < 1 - self.low)


def facts_of(row: Row) -> Sampled:
    """How the row's response came about; the fault's needs were checked before."""
    assert row.sampled is not None
    return row.sampled


def response_of(row: Row) -> Tensor:
    """Which of the response's R tokens are trained, shape (R,), bool."""
    return row.trained[facts_of(row).start :]


def old_of(row: Row, policy: PolicyFacts) -> Tensor:
    """Log-probabilities of the trained tokens under the old policy, shape (n,)."""
    sampled = facts_of(row)
    if row.behaviour is not None:
        return row.behaviour
    return policy.statistics([row])[0][0] if sampled.old is None else sampled.old[response_of(row)]


# Advantages


def baseline_batch(generation: Generation) -> Tensor:
    """Reward minus the mean of the whole rollout batch, shape (N,)."""
    centred = generation.rewards - generation.rewards.mean()
    return centred / _spread_of_groups(generation, generation.groups) if generation.std else centred


def baseline_missing(generation: Generation) -> Tensor:
    """The reward itself, shape (N,)."""
    rewards = generation.rewards
    return rewards / _spread_of_groups(generation, generation.groups) if generation.std else rewards


def groups_interleaved(generation: Generation) -> Tensor:
    """Against every G-th response instead of G neighbours, shape (N,)."""
    order = torch.argsort(generation.groups, stable=True)
    number = int(generation.groups.unique().numel())
    wrong = torch.empty_like(generation.groups)
    wrong[order] = torch.arange(len(order)) % number
    return against(generation, wrong)


def groups_shifted(generation: Generation) -> Tensor:
    """Groups begin one response too early, shape (N,)."""
    return against(generation, torch.roll(generation.groups, -1))


def std_biased(generation: Generation) -> Tensor:
    """The standard deviation is divided by n, not by n - 1, shape (N,)."""
    return against(generation, generation.groups, correction=0)


def std_of_batch(generation: Generation) -> Tensor:
    """Divided by the standard deviation of the whole rollout batch, shape (N,)."""
    centred = against(replace(generation, std=False), generation.groups)
    return centred / (generation.rewards.std() + STD_EPS)


def against(generation: Generation, groups: Tensor, correction: int = 1) -> Tensor:
    means = torch.stack([generation.rewards[groups == group].mean() for group in groups])
    centred = generation.rewards - means
    return centred / _spread_of_groups(generation, groups, correction) if generation.std else centred


def _spread_of_groups(generation: Generation, groups: Tensor, correction: int = 1) -> Tensor:
    found = []
    for group in groups:
        own = generation.rewards[groups == group]
        found.append(own.std(correction=min(correction, len(own) - 1)) + STD_EPS)
    return torch.stack(found)


def with_advantages(rule: Callable[[Generation], Tensor]) -> Change:
    """Weights with other advantages.

    Args:
        rule: of a rollout batch, one advantage a response, shape (N,).
    """

    def change(window: Window, policy: PolicyFacts) -> Window:
        found: dict[int, Tensor] = {}
        values = []
        for row in window.batch.rows:
            sampled = facts_of(row)
            own = found.setdefault(id(sampled.generation), rule(sampled.generation))
            values.append(float(own[sampled.place]))
        return replace(window, batch=advantaged(window.batch, values, policy))

    return change


def advantage_negated(window: Window, policy: PolicyFacts) -> Window:
    """Rewards are minimised."""
    values = [-facts_of(row).advantage for row in window.batch.rows]
    return replace(window, batch=advantaged(window.batch, values, policy))


def advantaged(batch: Batch, advantages: Sequence[float], policy: PolicyFacts) -> Batch:
    """The batch with these advantages, one a row, in place of its own."""
    j, rows = policy_term(batch), []
    for row, advantage in zip(batch.rows, advantages, strict=True):
        weights = row.weights.clone()
        weights[j] = acting(row, batch.terms[j], advantage, policy).to(weights)
        rows.append(replace(row, weights=weights, sampled=replace(facts_of(row), advantage=advantage)))
    return replace(batch, rows=tuple(rows))


def acting(row: Row, term: Term, advantage: float, policy: PolicyFacts) -> Tensor:
    """The policy term's weights of the trained tokens for an advantage, shape (n,), float64."""
    sampled, trained = facts_of(row), response_of(row)
    weight = torch.full((int(trained.sum()),), advantage, dtype=torch.float64)
    if is_share(term):
        weight /= max(len(weight), 1)
    if sampled.trust is not None:
        weight *= sampled.trust[trained].double()
    if sampled.generation.sequence_ratio and isinstance(term.surrogate, Logp):
        generation = sampled.generation
        weight *= held_ratio(row, advantage, generation.clip_low, generation.clip_high, math.inf, policy)
    return weight


def held_ratio(row: Row, advantage: float, low: float, high: float, dual: float, policy: PolicyFacts) -> float:
    """The ratio of a whole response: geometric mean over its trained tokens; 0 where the clip holds it back."""
    sampled = facts_of(row)
    old = row.behaviour if sampled.old is None else sampled.old[response_of(row)]
    if old is None or not len(old):
        return 1.0
    now = policy.statistics([row])[0][0].double()
    ratio = float((now - old.to(now)).mean().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp())
    held = ratio > 1 + high if advantage >= 0 else ratio < 1 - low or ratio > dual
    return 0.0 if held else ratio


# Masks


def truncated_trained(window: Window, policy: PolicyFacts) -> Window:
    """Responses that were cut at the length limit are trained and counted."""

    def wanted(row: Row) -> Tensor | None:
        sampled = facts_of(row)
        if not sampled.truncated or row.n_trained:
            return None
        places = torch.ones(len(row.token_ids) - sampled.start, dtype=torch.bool)
        return places if sampled.environment is None else places & ~sampled.environment

    return _retrained(window, policy, wanted)


def environment_trained(window: Window, policy: PolicyFacts) -> Window:
    """Tokens that the policy did not write are trained and counted."""

    def wanted(row: Row) -> Tensor | None:
        environment = facts_of(row).environment
        return None if environment is None or not row.n_trained else response_of(row) | environment

    return _retrained(window, policy, wanted)


def uninformative_counted(window: Window, policy: PolicyFacts) -> Window:
    """Responses of groups with equal rewards are counted by the normaliser."""

    def wanted(row: Row) -> Tensor | None:
        sampled = facts_of(row)
        if row.n_trained or sampled.truncated or sampled.advantage != 0:
            return None
        places = torch.ones(len(row.token_ids) - sampled.start, dtype=torch.bool)
        return places if sampled.environment is None else places & ~sampled.environment

    return _retrained(window, policy, wanted)


def _retrained(window: Window, policy: PolicyFacts, wanted: Callable[[Row], Tensor | None]) -> Window:
    """Rows with other trained tokens of the response, shape (R,), where there are any."""
    batch, rows = window.batch, []
    coefficients = coefficients_of(batch)
    for row in batch.rows:
        places = wanted(row)
        rows.append(row if places is None else _with_tokens(row, places, batch, coefficients, policy))
    return replace(window, batch=replace(batch, rows=tuple(rows)))


def _with_tokens(row: Row, places: Tensor, batch: Batch, coefficients: Tensor, policy: PolicyFacts) -> Row:
    sampled, count = facts_of(row), int(places.sum())
    trained = torch.zeros(len(row.token_ids), dtype=torch.bool)
    trained[sampled.start :] = places
    shares = torch.tensor([1 / max(count, 1) if is_share(term) else 1.0 for term in batch.terms], dtype=torch.float64)
    weights = (coefficients * shares)[:, None].repeat(1, count)
    wide = Row(row.token_ids, trained, weights, sampled=sampled)
    if row.behaviour is not None:
        old = sampled.old if sampled.old is not None else policy.statistics([_whole_response(row)])[0][0]
        wide = replace(wide, behaviour=old[places])
    if row.reference is not None and sampled.reference is not None:
        wide = replace(wide, reference=sampled.reference[places])
    j = policy_term(batch)
    weights[j] = acting(wide, batch.terms[j], sampled.advantage, policy)
    return wide


def _whole_response(row: Row) -> Row:
    trained = torch.arange(len(row.token_ids)) >= facts_of(row).start
    return Row(row.token_ids, trained, torch.zeros(1, int(trained.sum())))


def coefficients_of(batch: Batch) -> Tensor:
    """What KL and entropy terms weigh a token, or a response where weights are shares, shape (J,), float64."""
    row = next((row for row in batch.rows if row.n_trained), None)
    if row is None:
        return torch.zeros(len(batch.terms), dtype=torch.float64)
    times = torch.tensor([row.n_trained if is_share(term) else 1 for term in batch.terms], dtype=torch.float64)
    return row.weights.double().mean(1) * times


# Normaliser


def uninformative_left_out(window: Window, policy: PolicyFacts) -> Window:
    """Tokens of responses without an advantage are not counted by the normaliser."""
    rows = window.batch.rows
    counted = sum(row.n_trained for row in rows if facts_of(row).advantage != 0)
    factor = sum(row.n_trained for row in rows) / counted if counted else 1.0
    return replace(window, batch=scaled(window.batch, [factor] * len(rows)))


def group_means(window: Window, policy: PolicyFacts) -> Window:
    """Every group is divided by its own tokens, and groups are averaged."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, row in enumerate(window.batch.rows):
        sampled = facts_of(row)
        key = (id(sampled.generation), int(sampled.generation.groups[sampled.place]))
        groups.setdefault(key, []).append(i)
    return replace(window, batch=means_of_groups(window.batch, list(groups.values())))


# Ratio and clip


def with_surrogate(change_of: Callable[[Clip], Clip | Ratio]) -> Change:
    """The clipped ratio replaced."""

    def change(window: Window, policy: PolicyFacts) -> Window:
        return replace(window, batch=_with_clip(window.batch, change_of))

    return change


def _with_clip(batch: Batch, change_of: Callable[[Clip], Clip | Ratio]) -> Batch:
    terms = list(batch.terms)
    for j, term in enumerate(terms):
        if isinstance(term.surrogate, Clip):
            terms[j] = replace(term, surrogate=change_of(term.surrogate))
    return replace(batch, terms=tuple(terms))


def ratio_one(window: Window, policy: PolicyFacts) -> Window:
    """Old log-probabilities are those of the policy as it stands: no ratio differs from one, nothing is clipped."""
    rows = tuple(replace(row, behaviour=None) for row in window.batch.rows)
    return replace(window, batch=replace(window.batch, rows=rows))


def ratio_by_sequence(window: Window, policy: PolicyFacts) -> Window:
    """One ratio a response, clipped as a whole, where each token was to have its own."""
    batch, j = window.batch, policy_term(window.batch)
    term, clip = batch.terms[j], batch.terms[j].surrogate
    assert isinstance(clip, Clip)
    rows = []
    for row in batch.rows:
        weights = row.weights.clone()
        advantage = facts_of(row).advantage
        weights[j] *= held_ratio(row, advantage, clip.low, clip.high, clip.dual, policy)
        rows.append(replace(row, weights=weights))
    terms = (*batch.terms[:j], replace(term, surrogate=Logp()), *batch.terms[j + 1 :])
    return replace(window, batch=replace(batch, terms=terms, rows=tuple(rows)))


def ratio_by_token(window: Window, policy: PolicyFacts) -> Window:
    """Each token its own ratio, clipped on its own, where a response was to have one."""
    batch, j = window.batch, policy_term(window.batch)
    rows, terms = [], list(batch.terms)
    for row in batch.rows:
        sampled, generation = facts_of(row), facts_of(row).generation
        terms[j] = replace(batch.terms[j], surrogate=Clip(generation.clip_low, generation.clip_high))
        weights = row.weights.clone()
        weights[j] = acting(row, terms[j], sampled.advantage, policy).to(weights)
        old = row.behaviour if sampled.old is None else sampled.old[response_of(row)]
        rows.append(replace(row, weights=weights, behaviour=old))
    return replace(window, batch=replace(batch, terms=tuple(terms), rows=tuple(rows)))

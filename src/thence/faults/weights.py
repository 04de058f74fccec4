"""Faults of the weights: thence divides by the counts of the whole window, so every wrong divisor is a factor here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from thence.faults.cut import Change, Cut, PolicyFacts, Window
from thence.objective import Batch, Term, divisors, is_penalty, local_counts

STD_EPS = 1e-6


def scaled(batch: Batch, factor_of_row: Sequence[float | Tensor]) -> Batch:
    """The batch with the weights of every row multiplied: by a number, or by one a term, shape (J,)."""
    rows = []
    for row, factor in zip(batch.rows, factor_of_row, strict=True):
        times = factor[:, None].to(row.weights) if isinstance(factor, Tensor) else factor
        rows.append(replace(row, weights=row.weights * times))
    return replace(batch, rows=tuple(rows))


def divisors_of(batch: Batch, rows: Sequence[int] | None = None) -> Tensor:
    """Z of every term if these rows (default: all) were the whole step, shape (J,), float64."""
    part = batch if rows is None else replace(batch, rows=tuple(batch.rows[i] for i in rows))
    return torch.tensor(divisors(batch.terms, local_counts(part)), dtype=torch.float64)


def with_divisors_of(before: Batch, after: Batch) -> Batch:
    """``after``, its weights scaled so that they are divided as if the counts were those of ``before``."""
    factor_J = divisors_of(after) / divisors_of(before)
    return scaled(after, [factor_J] * len(after.rows))


def is_share(term: Term) -> bool:
    """Whether the term's weights are shares of a response: sequence means."""
    return term.normaliser.of == "sequences" and term.normaliser.times == 1.0


def by_means(groups_of: Callable[[Cut], Sequence[Sequence[int]]]) -> Change:
    """Each group of rows gets its own mean, and the means are averaged.

    Weights times ``Z / (M z_m)``: Z of the window, z_m of the group, M groups; for a token mean ``N / (M n_m)``.
    """

    def change(window: Window, policy: PolicyFacts) -> Window:
        return replace(window, batch=means_of_groups(window.batch, groups_of(window.cut)))

    return change


def means_of_groups(batch: Batch, groups: Sequence[Sequence[int]]) -> Batch:
    """The batch with the mean over these groups of rows of each group's own mean."""
    return _means(batch, groups, [1 / max(len(groups), 1)] * len(groups))


def sum_of_means(window: Window, policy: PolicyFacts) -> Window:
    """Micro-batch means added up over a rank's slots and averaged over ranks: never divided by the accumulation."""
    groups = window.cut.micro_batches
    return replace(window, batch=_means(window.batch, groups, [1 / len(window.cut.shares)] * len(groups)))


def means_of_sequence_means(window: Window, policy: PolicyFacts) -> Window:
    """Each micro-batch gets the mean of its sequence means, and these are averaged."""
    micro_batches = window.cut.micro_batches
    groups = [(i,) for cell in micro_batches for i in cell]
    shares = [1 / (len(micro_batches) * len(cell)) for cell in micro_batches for _ in cell]
    return replace(window, batch=_means(window.batch, groups, shares))


def _means(batch: Batch, groups: Sequence[Sequence[int]], shares: Sequence[float]) -> Batch:
    whole_J = divisors_of(batch)
    factor: list[float | Tensor] = [1.0] * len(batch.rows)
    for group, share in zip(groups, shares, strict=True):
        own_J = whole_J / divisors_of(batch, group) * share
        for i in group:
            factor[i] = own_J
    return scaled(batch, factor)


def constant_divisor(window: Window, policy: PolicyFacts) -> Window:
    """Divided by rows times a constant, for any window."""
    batch = window.batch
    factor_J = divisors_of(batch) / (max(len(batch.rows), 1) * policy.constant_tokens)
    return replace(window, batch=scaled(batch, [factor_J] * len(batch.rows)))


def keeping(kept: Callable[[int, int, Cut], bool]) -> Change:
    """Only some micro-batches arrive at the optimizer; all of them were counted.

    Args:
        kept: (rank, slot, cut) -> whether the micro-batch arrives.
    """

    def change(window: Window, policy: PolicyFacts) -> Window:
        factor = [0.0] * len(window.batch.rows)
        for rank, slots in enumerate(window.cut.cells):
            for slot, cell in enumerate(slots):
                for i in cell:
                    factor[i] = float(kept(rank, slot, window.cut))
        return replace(window, batch=with_divisors_of(window.batch, scaled(window.batch, factor)))

    return change


def is_last(rank: int, slot: int, cut: Cut) -> bool:
    """Whether this is the last micro-batch of its rank."""
    return slot == len(cut.cells[rank]) - 1


def double_counted(window: Window, policy: PolicyFacts) -> Window:
    """The gradient of every rank's first micro-batch is added twice."""
    twice = {i for slots in window.cut.cells if slots for i in slots[0]}
    return replace(
        window, batch=scaled(window.batch, [2.0 if i in twice else 1.0 for i in range(len(window.batch.rows))])
    )


def times(factor_of: Callable[[Cut], float]) -> Change:
    """The whole gradient times a number that hangs on the cut."""

    def change(window: Window, policy: PolicyFacts) -> Window:
        return replace(window, batch=scaled(window.batch, [factor_of(window.cut)] * len(window.batch.rows)))

    return change


def by_token(weight_of: Callable[[Tensor, Tensor], Tensor]) -> Change:
    """Each token's weight times a function of its log-probability and entropy under the model as it stands."""

    def change(window: Window, policy: PolicyFacts) -> Window:
        batch = window.batch
        found = policy.statistics(batch.rows)
        rows = [
            replace(row, weights=row.weights * weight_of(logp, entropy)[None].to(row.weights))
            for row, (logp, entropy) in zip(batch.rows, found, strict=True)
        ]
        return replace(window, batch=with_divisors_of(batch, replace(batch, rows=tuple(rows))))

    return change


def advantage_by_std(window: Window, policy: PolicyFacts) -> Window:
    """Advantages divided by the standard deviation of their group; rows of one prompt are a group."""
    batch, factor = window.batch, [1.0] * len(window.batch.rows)
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(batch.rows):
        groups.setdefault(tuple(row.token_ids[: _prompt_length(row.trained)].tolist()), []).append(i)
    for group in groups.values():
        deviation = _spread(torch.stack([_advantage(batch, i) for i in group]))
        for i in group:
            factor[i] = 1 / (deviation + STD_EPS) if deviation else 1.0
    return replace(window, batch=_advantaged(batch, factor, 0.0))


def advantage_whitened(window: Window, policy: PolicyFacts) -> Window:
    """Advantages with mean 0 and standard deviation 1 over all rows of the window."""
    batch = window.batch
    if not batch.rows:
        return window
    advantages = torch.stack([_advantage(batch, i) for i in range(len(batch.rows))])
    deviation = _spread(advantages)
    if not deviation:
        return window
    factor = [1 / (deviation + STD_EPS)] * len(batch.rows)
    return replace(window, batch=_advantaged(batch, factor, float(advantages.mean())))


def _advantage(batch: Batch, i: int) -> Tensor:
    """The mean weight of a row's tokens in the first term, times its length where weights are shares."""
    weights = batch.rows[i].weights[0].double()
    if not len(weights):
        return torch.zeros((), dtype=torch.float64)
    return weights.mean() * (len(weights) if is_share(batch.terms[0]) else 1)


def _advantaged(batch: Batch, factor: Sequence[float], shift: float) -> Batch:
    rows = []
    for row, times in zip(batch.rows, factor, strict=True):
        parts = []
        for term, weights in zip(batch.terms, row.weights, strict=True):
            if is_penalty(term):
                parts.append(weights)
            else:
                own = shift / max(row.n_trained, 1) if is_share(term) else shift
                parts.append((weights - own) * times)
        rows.append(replace(row, weights=torch.stack(parts)))
    return with_divisors_of(batch, replace(batch, rows=tuple(rows)))


def _spread(values: Tensor) -> float:
    """Unbiased standard deviation; 0 for one value, or for values that are all equal."""
    equal = len(values) < 2 or bool((values == values[0]).all())
    return 0.0 if equal else float(values.std())


def _prompt_length(trained: Tensor) -> int:
    places = trained.nonzero()
    return int(places[0]) if len(places) else len(trained)

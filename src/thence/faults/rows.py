"""Faults of the rows: tokens trained that should not be, or the other way round; rows repeated or run together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from thence.faults.cut import Cut, PolicyFacts, Window, cut_rows
from thence.faults.weights import is_share, with_divisors_of
from thence.objective import Row, Term, trained_tokens


def prompt_trained(window: Window, policy: PolicyFacts) -> Window:
    """All tokens but the first are trained and counted."""
    terms = window.batch.terms
    rows = [
        widened(row, row.token_ids, trained_tokens(0, len(row.token_ids), "all"), terms, policy)
        for row in window.batch.rows
    ]
    return replace(window, batch=replace(window.batch, rows=tuple(rows)))


def padding_trained(window: Window, policy: PolicyFacts) -> Window:
    """Rows are filled up to the longest of their micro-batch, and the filling is trained and counted."""
    rows = list(window.batch.rows)
    for cell in window.cut.micro_batches:
        longest = max(len(rows[i].token_ids) for i in cell)
        for i in cell:
            missing = longest - len(rows[i].token_ids)
            ids = torch.cat([rows[i].token_ids, torch.full((missing,), policy.pad, dtype=torch.int64)])
            trained = torch.cat([rows[i].trained, torch.ones(missing, dtype=torch.bool)])
            rows[i] = widened(rows[i], ids, trained, window.batch.terms, policy)
    return replace(window, batch=replace(window.batch, rows=tuple(rows)))


def end_missing(window: Window, policy: PolicyFacts) -> Window:
    """The last trained token of every row is neither trained nor counted."""
    return _narrowed_all(window, slice(None, -1))


def first_missing(window: Window, policy: PolicyFacts) -> Window:
    """The first trained token of every row is neither trained nor counted."""
    return _narrowed_all(window, slice(1, None))


def responses_truncated(window: Window, policy: PolicyFacts) -> Window:
    """Trained tokens of a row beyond half the length of the longest response are neither trained nor counted."""
    longest = max((row.n_trained for row in window.batch.rows), default=0)
    return _narrowed_all(window, slice(None, max(longest // 2, 1)))


def rows_repeated(window: Window, policy: PolicyFacts) -> Window:
    """Where the last micro-batches are short, rows from the beginning come again until all ranks have the same."""
    rows = window.batch.rows
    if not rows:
        return window
    micro_batch = len(window.cut.cells[0][0])
    together = micro_batch * window.cut.ranks
    full = -(-len(rows) // together) * together
    repeated = tuple(rows[i % len(rows)] for i in range(full))
    cut = cut_rows(full, micro_batch, window.cut.accumulation, window.cut.ranks)
    return Window(replace(window.batch, rows=repeated), cut)


def run_together(window: Window, policy: PolicyFacts) -> Window:
    """The rows of a micro-batch become one row in which each attends to those before it.

    A row that would be longer than the model has positions is broken where an example ends.
    """
    rows: list[Row] = []
    cells = []
    for slots in window.cut.cells:
        own = []
        for cell in slots:
            joined = [_joined(part) for part in _fitting([window.batch.rows[i] for i in cell], policy.longest)]
            own.append(tuple(range(len(rows), len(rows) + len(joined))))
            rows += joined
        cells.append(tuple(own))
    batch = with_divisors_of(window.batch, replace(window.batch, rows=tuple(rows)))
    return Window(batch, Cut(tuple(cells), window.cut.accumulation))


def widened(row: Row, token_ids: Tensor, trained: Tensor, terms: Sequence[Term], policy: PolicyFacts) -> Row:
    """The row with more trained tokens; new ones get the mean weight of the old ones.

    Args:
        token_ids: of the row, perhaps with more behind them, shape (L,).
        trained: at least the tokens trained so far, shape (L,), bool.
    """
    n, more = row.n_trained, int(trained.sum())
    if n == 0 or more == n:
        return row
    old = torch.cat([row.trained, torch.zeros(len(token_ids) - len(row.token_ids), dtype=torch.bool)])[trained]
    weights = row.weights.mean(1, keepdim=True).repeat(1, more)
    weights[:, old] = row.weights
    wide = Row(token_ids, trained, _as_shares(weights, terms, n / more))
    if row.behaviour is None and row.reference is None:
        return wide
    now = policy.statistics([wide])[0][0]
    return replace(
        wide,
        behaviour=None if row.behaviour is None else now.to(row.behaviour).masked_scatter(old, row.behaviour),
        reference=None if row.reference is None else now.to(row.reference).masked_scatter(old, row.reference),
    )


def narrowed(row: Row, kept: slice, terms: Sequence[Term]) -> Row:
    """The row with only some of its trained tokens."""
    places = row.trained.nonzero()[:, 0][kept]
    trained = torch.zeros_like(row.trained)
    trained[places] = True
    weights = _as_shares(row.weights[:, kept], terms, row.n_trained / max(len(places), 1))
    behaviour, reference = (None if old is None else old[kept] for old in (row.behaviour, row.reference))
    return Row(row.token_ids, trained, weights, behaviour, reference)


def _narrowed_all(window: Window, kept: slice) -> Window:
    rows = tuple(narrowed(row, kept, window.batch.terms) for row in window.batch.rows)
    return replace(window, batch=replace(window.batch, rows=rows))


def _as_shares(weights_JT: Tensor, terms: Sequence[Term], factor: float) -> Tensor:
    """Where weights are shares of a response, they go on adding up to what they did."""
    factor_J = torch.tensor([factor if is_share(term) else 1.0 for term in terms], dtype=weights_JT.dtype)
    return weights_JT * factor_J[:, None]


def _fitting(rows: Sequence[Row], longest: int) -> list[list[Row]]:
    parts: list[list[Row]] = []
    used = 0
    for row in rows:
        if parts and used + len(row.token_ids) <= longest:
            parts[-1].append(row)
            used += len(row.token_ids)
        else:
            parts.append([row])
            used = len(row.token_ids)
    return parts


def _joined(rows: Sequence[Row]) -> Row:
    behaviour, reference = [row.behaviour for row in rows], [row.reference for row in rows]
    return Row(
        torch.cat([row.token_ids for row in rows]),
        torch.cat([row.trained for row in rows]),
        torch.cat([row.weights for row in rows], dim=1),
        torch.cat([part for part in behaviour if part is not None]) if behaviour[0] is not None else None,
        torch.cat([part for part in reference if part is not None]) if reference[0] is not None else None,
    )

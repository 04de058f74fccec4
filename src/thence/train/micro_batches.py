"""Cutting a batch into micro-batches by token budget. It decides memory and speed, never the gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thence.objective import BareRow, Batch, Row, TokenInputs
from thence.train.parallel import Ranks


@dataclass(frozen=True)
class MicroBatch:
    """Rows laid out for one forward pass.

    Args:
        token_ids: (rows, longest) padded on the right, or (1, total) when packed.
        lengths: length of each row, in order; packed rows lie end to end.
        packed: which of the two.
        predicts_T: positions in the flattened hidden states that predict the trained tokens, shape (T,).
        target_T: the trained tokens, shape (T,), int64.
    """

    token_ids: Tensor
    lengths: tuple[int, ...]
    packed: bool
    predicts_T: Tensor
    target_T: Tensor


def plan(lengths: Sequence[int], budget: int, packing: bool) -> list[list[int]]:
    """Which rows go together: sorted by length, as many as the token budget holds, at least one.

    Args:
        lengths: tokens of each row.
        budget: most tokens in a micro-batch, padding included; a longer row stands alone.
        packing: rows are laid end to end, so that padding costs nothing.

    Returns:
        Row indices of each micro-batch; every row exactly once, the longest first.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    used = 0
    for i in order:
        cost = lengths[i] if packing or not groups else lengths[groups[-1][0]]
        if groups and used + cost <= budget:
            groups[-1].append(i)
            used += cost
        else:
            groups.append([i])
            used = lengths[i]
    return groups


def micro_batches(
    rows: Sequence[BareRow], budget: int, packing: bool, device: torch.device
) -> Iterator[tuple[list[int], MicroBatch]]:
    """The micro-batches of a batch and the indices of their rows, moved to the device one at a time."""
    for group in plan([len(row.token_ids) for row in rows], budget, packing):
        yield group, lay_out([rows[i] for i in group], packing, device)


@dataclass(frozen=True)
class Pass:
    """One forward pass of an optimizer step.

    Args:
        group: the indices of its rows; empty: a pass that this rank makes only because others make one.
        micro, inputs: its rows, laid out, and what the objective needs of them.
        learns: whether it has a gradient.
        last: whether it is the last one of the step that has.
    """

    group: list[int]
    micro: MicroBatch
    inputs: TokenInputs
    learns: bool
    last: bool


def step_passes(batch: Batch, budget: int, packing: bool, device: torch.device, ranks: Ranks) -> Iterator[Pass]:
    """The passes of an optimizer step over this rank's rows.

    Rows without any weight (a group whose rewards are all equal, ...) go into passes of their own, last. They
    need no backward pass.
    """
    live = [bool(row.weights.any()) for row in batch.rows]
    for learns in (True, False):
        own = [i for i, is_live in enumerate(live) if is_live == learns]
        rows = [batch.rows[i] for i in own]
        groups = plan([len(row.token_ids) for row in rows], budget, packing)
        passes = ranks.equal_passes(len(groups))
        for number in range(passes):
            group = groups[number] if number < len(groups) else []
            chosen = [rows[i] for i in group] or [_nothing(batch)]
            micro = lay_out(chosen, packing, device)
            yield Pass(
                [own[i] for i in group], micro, token_inputs(chosen, micro), learns, learns and number == passes - 1
            )


def scoring_passes(
    rows: Sequence[BareRow], budget: int, packing: bool, device: torch.device, ranks: Ranks
) -> Iterator[tuple[list[int], MicroBatch]]:
    """The micro-batches of rows to be scored and the indices of their rows; none: to keep other ranks company."""
    groups = plan([len(row.token_ids) for row in rows], budget, packing)
    for number in range(ranks.equal_passes(len(groups))):
        group = groups[number] if number < len(groups) else []
        yield group, lay_out([rows[i] for i in group] or [BareRow(*_two_tokens())], packing, device)


def _two_tokens() -> tuple[Tensor, Tensor]:
    return torch.zeros(2, dtype=torch.int64), torch.tensor([False, True])


def _nothing(batch: Batch) -> Row:
    """A row of one trained token that weighs nothing: its pass adds a gradient of zero."""
    one = torch.zeros(1, dtype=torch.float64)
    return Row(*_two_tokens(), torch.zeros(len(batch.terms), 1), one, one)


def lay_out(rows: Sequence[BareRow], packing: bool, device: torch.device) -> MicroBatch:
    """One micro-batch of these rows.

    Rows are padded on the right. Attention is causal, so no token of a row ever sees its padding and no mask is needed.
    """
    lengths = tuple(len(row.token_ids) for row in rows)
    if packing:
        token_ids = torch.cat([row.token_ids for row in rows])[None]
        starts = [sum(lengths[:i]) for i in range(len(rows))]
    else:
        token_ids = torch.nn.utils.rnn.pad_sequence([row.token_ids for row in rows], batch_first=True)
        starts = [i * max(lengths) for i in range(len(rows))]
    predicts = [row.trained.nonzero()[:, 0] + (start - 1) for row, start in zip(rows, starts, strict=True)]
    target_T = torch.cat([row.token_ids[row.trained] for row in rows])
    return MicroBatch(token_ids.to(device), lengths, packing, torch.cat(predicts).to(device), target_T.to(device))


def token_inputs(rows: Sequence[Row], micro: MicroBatch) -> TokenInputs:
    """What the objective needs of the rows of a micro-batch.

    Raises:
        ValueError: some rows have old or reference log-probabilities and some have none.
    """
    device = micro.target_T.device
    return TokenInputs(
        target_T=micro.target_T,
        weight_JT=torch.cat([row.weights for row in rows], dim=1).to(device),
        behaviour_T=_joined([row.behaviour for row in rows], device),
        reference_T=_joined([row.reference for row in rows], device),
    )


def _joined(parts: list[Tensor | None], device: torch.device) -> Tensor | None:
    present = [part for part in parts if part is not None]
    if not present:
        return None
    if len(present) != len(parts):
        raise ValueError("some rows of a batch have old log-probabilities and some have none")
    return torch.cat(present).to(device)

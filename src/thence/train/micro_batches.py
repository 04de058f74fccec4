"""Cutting a batch into micro-batches by token budget. It decides memory and speed, never the gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thence.objective import Row, TokenInputs


@dataclass(frozen=True)
class MicroBatch:
    """Rows laid out for one forward pass.

    Args:
        token_ids: (rows, longest) padded on the right, or (1, total) when packed.
        lengths: length of each row, in order; packed rows lie end to end.
        packed: which of the two.
        predicts_T: positions in the flattened hidden states that predict the trained tokens, shape (T,).
        inputs: targets, weights and old log-probabilities of the trained tokens.
        silent: every weight is zero, so that the rows have no gradient and need no backward pass.
    """

    token_ids: Tensor
    lengths: tuple[int, ...]
    packed: bool
    predicts_T: Tensor
    inputs: TokenInputs
    silent: bool = False


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
    rows: Sequence[Row], budget: int, packing: bool, device: torch.device
) -> Iterator[tuple[list[int], MicroBatch]]:
    """The micro-batches of a batch and the indices of their rows, moved to the device one at a time.

    Rows without any weight (a group whose rewards are all equal, ...) go into separate micro-batches, last.
    """
    silent_rows = [not bool(row.weights.any()) for row in rows]
    for silent in (False, True):
        own = [i for i, is_silent in enumerate(silent_rows) if is_silent == silent]
        for group in plan([len(rows[i].token_ids) for i in own], budget, packing):
            chosen = [own[i] for i in group]
            yield chosen, lay_out([rows[i] for i in chosen], packing, device, silent)


def lay_out(rows: Sequence[Row], packing: bool, device: torch.device, silent: bool = False) -> MicroBatch:
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
    inputs = TokenInputs(
        target_T=torch.cat([row.token_ids[row.trained] for row in rows]).to(device),
        weight_JT=torch.cat([row.weights for row in rows], dim=1).to(device),
        behaviour_T=_joined([row.behaviour for row in rows], device),
        reference_T=_joined([row.reference for row in rows], device),
    )
    return MicroBatch(token_ids.to(device), lengths, packing, torch.cat(predicts).to(device), inputs, silent)


def _joined(parts: list[Tensor | None], device: torch.device) -> Tensor | None:
    present = [part for part in parts if part is not None]
    if not present:
        return None
    if len(present) != len(parts):
        raise ValueError("some rows of a batch have old log-probabilities and some have none")
    return torch.cat(present).to(device)

"""Cutting a batch into micro-batches by token budget. It decides memory and speed, never the gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from thence.models.ulysses import Piece
from thence.objective import BareRow, Batch, Divergence, Row, TokenInputs, TokenStats
from thence.train.parallel import ContextGroup, Ranks


@dataclass(frozen=True)
class Share:
    """This rank's share of rows that several ranks hold in pieces.

    Args:
        context: the ranks that hold them.
        tokens: of the rows on this rank; padding is not counted.
        start: where this rank's trained tokens begin among those of all of them.
        trained: trained tokens of the rows.
    """

    context: ContextGroup
    tokens: int
    start: int
    trained: int


@dataclass(frozen=True)
class MicroBatch:
    """Rows laid out for one forward pass.

    Args:
        token_ids: (rows, longest) padded on the right, or (1, total) when packed; this rank's piece of it, when shared.
        lengths: length of each row, in order; packed rows lie end to end. Shared ones end with the padding, if any.
        packed: which of the two.
        predicts_T: positions in the flattened hidden states that predict the trained tokens, shape (T,).
        target_T: the trained tokens, shape (T,), int64.
        share: which part of the rows this is; None: all of it.
        shown: the rows that a teacher reads in place of these, with the same trained tokens; None: no teacher does.
    """

    token_ids: Tensor
    lengths: tuple[int, ...]
    packed: bool
    predicts_T: Tensor
    target_T: Tensor
    share: Share | None = None
    shown: MicroBatch | None = None

    @property
    def piece(self) -> Piece | None:
        """Who holds which part of the rows; None: this rank holds them whole."""
        return None if self.share is None else self.share.context.piece

    @property
    def tokens(self) -> int:
        """Tokens of rows that this rank holds, padding not counted."""
        return sum(self.lengths) if self.share is None else self.share.tokens

    def whole(self, values: Tensor) -> Tensor:
        """Values of the trained tokens of all rows, (..., all), from those of this piece, (..., T). Ranks that share
        the rows call it together.
        """
        share = self.share
        return values if share is None else share.context.whole(values, share.start, share.trained)

    def beside(self, values_TD: Tensor) -> Tensor:
        """What was found at the trained tokens of ``shown``, (its T, D), at this micro-batch's own, (T, D).

        The same, unless ranks share the rows: then they are cut elsewhere. Those ranks call it together.
        """
        if self.share is None or self.shown is None:
            return values_TD
        start = self.share.start
        return self.shown.whole(values_TD.T)[:, start : start + len(self.target_T)].T


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


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Args:
        group: the indices of this rank's own rows in it.
        micro: its rows, laid out.
        rows: how many it has, those of the ranks that share them included; 0: it only keeps other ranks company.
        own_T: where the trained tokens of the own rows are among those of all its rows.
    """

    group: list[int]
    micro: MicroBatch
    rows: int
    own_T: Tensor

    def own(self, values: Tensor) -> Tensor:
        """Values of the trained tokens of this rank's own rows, (..., own), from those that the pass has given here,
        (..., T). Ranks that share the rows call it together.
        """
        return values if self.micro.share is None else self.micro.whole(values)[..., self.own_T.to(values.device)]


@dataclass(frozen=True)
class StepPass(Pass):
    """One forward pass of an optimizer step.

    Args:
        inputs: what the objective needs of its rows.
        learns: whether it has a gradient.
        last: whether it is the last one of the step that has.
    """

    inputs: TokenInputs
    learns: bool
    last: bool

    def own_statistics(self, stats: TokenStats) -> TokenStats:
        """Statistics of the own rows' trained tokens. Ranks that share the rows call it together."""
        if self.micro.share is None:
            return stats
        every = (stats.logp_T, stats.entropy_T, stats.slope_T, stats.clipped_T.to(stats.logp_T))
        logp_T, entropy_T, slope_T, clipped_T = self.own(torch.stack(every))
        return TokenStats(logp_T, entropy_T, slope_T, clipped_T > 0)


def step_passes(batch: Batch, budget: int, packing: bool, device: torch.device, ranks: Ranks) -> Iterator[StepPass]:
    """The passes of an optimizer step over this rank's rows, and those of the ranks that share rows with it.

    Rows without any weight (a group whose rewards are all equal, ...) go into passes of their own, last. They
    need no backward pass.

    Args:
        budget: most tokens of a pass that one rank holds.
    """
    rows, own = _shared(batch.rows, ranks)
    taught = [j for j, term in enumerate(batch.terms) if isinstance(term.surrogate, Divergence)]
    live = [bool(row.weights.any()) for row in rows]
    for learns in (True, False):
        chosen = [i for i, is_live in enumerate(live) if is_live == learns]
        for made, held, remaining in _passes(rows, chosen, own, budget, packing, device, ranks, _nothing(batch)):
            micro = made.micro
            if taught and learns:
                shown = [_shown(row, row.weights[taught]) for row in held]
                micro = replace(micro, shown=lay_out(shown, packing, device, ranks.context))
            inputs = token_inputs(held, micro)
            yield StepPass(made.group, micro, made.rows, made.own_T, inputs, learns, learns and not remaining)


def _shown(row: Row, weights: Tensor) -> BareRow:
    """What a teacher reads in place of a row; of one that it does not teach, the row itself: nobody hears it.

    Raises:
        ValueError: the row has weights on a divergence from a teacher who reads nothing, or another response.
    """
    if row.shown is None:
        if weights.any():
            raise ValueError("a row has a weight on a divergence from a teacher, and nothing that the teacher reads")
        return row
    if not torch.equal(row.shown.token_ids[row.shown.trained], row.token_ids[row.trained]):
        raise ValueError("the teacher of a row reads other trained tokens than those of the row")
    return row.shown


def scoring_passes(
    rows: Sequence[BareRow], budget: int, packing: bool, device: torch.device, ranks: Ranks
) -> Iterator[Pass]:
    """The passes in which rows are scored, with those of the ranks that share rows with this one."""
    every, own = _shared(rows, ranks)
    nothing = BareRow(*_two_tokens())
    for made, _, _ in _passes(every, range(len(every)), own, budget, packing, device, ranks, nothing):
        yield made


R = TypeVar("R", bound=BareRow)


def _shared(rows: Sequence[R], ranks: Ranks) -> tuple[Sequence[R], range]:
    """The rows of all ranks that share them, and which are this rank's own."""
    if ranks.context is None:
        return rows, range(len(rows))
    every, before = ranks.context.rows(rows)
    return every, range(before, before + len(rows))


def _passes(
    rows: Sequence[R],
    chosen: Sequence[int],
    own: range,
    budget: int,
    packing: bool,
    device: torch.device,
    ranks: Ranks,
    nothing: R,
) -> Iterator[tuple[Pass, list[R], int]]:
    """The passes over the chosen rows, the rows of each, and how many passes are still to come; as many on every rank
    as FSDP needs, of a row that is nothing where there is no other.
    """
    context = ranks.context
    most = budget if context is None else budget * context.piece.size
    groups = plan([_length(rows[i]) for i in chosen], most, packing)
    passes = ranks.equal_passes(len(groups))
    for number in range(passes):
        places = [chosen[i] for i in groups[number]] if number < len(groups) else []
        held = [rows[i] for i in places] or [nothing]
        mine = [i - own.start for i in places if i in own]
        is_mine = [torch.full((rows[i].n_trained,), i in own) for i in places]
        own_T = torch.cat([torch.zeros(0, dtype=torch.bool), *is_mine]).nonzero()[:, 0]
        yield Pass(mine, lay_out(held, packing, device, context), len(places), own_T), held, passes - 1 - number


def _length(row: BareRow) -> int:
    """Tokens of a row, or of the one that a teacher reads in place of it, if that is longer."""
    shown = row.shown if isinstance(row, Row) else None
    return max(len(row.token_ids), 0 if shown is None else len(shown.token_ids))


def _two_tokens() -> tuple[Tensor, Tensor]:
    return torch.zeros(2, dtype=torch.int64), torch.tensor([False, True])


def _nothing(batch: Batch) -> Row:
    """A row of one trained token that weighs nothing: its pass adds a gradient of zero."""
    one = torch.zeros(1, dtype=torch.float64)
    return Row(*_two_tokens(), torch.zeros(len(batch.terms), 1), one, one)


def lay_out(
    rows: Sequence[BareRow], packing: bool, device: torch.device, context: ContextGroup | None = None
) -> MicroBatch:
    """One micro-batch of these rows; this rank's piece of it, where a group of ranks shares them.

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
    micro = MicroBatch(token_ids, lengths, packing, torch.cat(predicts), target_T)
    if context is not None:
        micro = _piece_of(micro, context)
    moved = {name: getattr(micro, name).to(device) for name in ("token_ids", "predicts_T", "target_T")}
    return replace(micro, **moved)


def _piece_of(micro: MicroBatch, context: ContextGroup) -> MicroBatch:
    """This rank's piece of packed rows. Padding makes all pieces equally long; it is one more row, seen by no other.

    The target of a piece's last token is in the next piece; targets are looked up in the whole rows, so it is there.
    """
    if not micro.packed:
        raise ValueError("only packed rows can be cut over ranks")
    tokens = sum(micro.lengths)
    padding = -tokens % context.piece.size
    mine = context.piece.of(tokens + padding)
    token_ids = torch.cat([micro.token_ids, micro.token_ids.new_zeros(1, padding)], 1)[:, mine]
    start, stop = (int((micro.predicts_T < place).sum()) for place in (mine.start, mine.stop))
    return MicroBatch(
        token_ids,
        (*micro.lengths, padding) if padding else micro.lengths,
        True,
        micro.predicts_T[start:stop] - mine.start,
        micro.target_T[start:stop],
        Share(context, max(0, min(mine.stop, tokens) - mine.start), start, len(micro.target_T)),
    )


def token_inputs(rows: Sequence[Row], micro: MicroBatch) -> TokenInputs:
    """What the objective needs of the rows of a micro-batch; of their trained tokens in this rank's piece, when shared.

    Raises:
        ValueError: some rows have old or reference log-probabilities and some have none.
    """
    device, start = micro.target_T.device, 0 if micro.share is None else micro.share.start
    here = slice(start, start + len(micro.target_T))
    behaviour_T, reference_T = (_joined([getattr(row, name) for row in rows]) for name in ("behaviour", "reference"))
    return TokenInputs(
        target_T=micro.target_T,
        weight_JT=torch.cat([row.weights for row in rows], dim=1)[:, here].to(device),
        behaviour_T=None if behaviour_T is None else behaviour_T[here].to(device),
        reference_T=None if reference_T is None else reference_T[here].to(device),
    )


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    if not present:
        return None
    if len(present) != len(parts):
        raise ValueError("some rows of a batch have old log-probabilities and some have none")
    return torch.cat(present)

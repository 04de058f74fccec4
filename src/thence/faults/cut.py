"""How a naive trainer would have cut the rows of a batch into micro-batches and dealt them to ranks.

thence's own step gives the same gradient for every cut; most faults are what other trainers make of theirs. The ranks
are virtual: one process plays them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from thence.objective import Batch, Row


@dataclass(frozen=True)
class Cut:
    """The micro-batches of one window.

    Args:
        cells: row indices of the micro-batch at ``cells[rank][slot]``; a rank may have fewer slots than another.
        accumulation: slots of a rank that the settings plan.
    """

    cells: tuple[tuple[tuple[int, ...], ...], ...]
    accumulation: int

    @property
    def ranks(self) -> int:
        """Ranks, those without rows included."""
        return len(self.cells)

    @property
    def slots(self) -> int:
        """Slots of the rank that has most."""
        return max(len(slots) for slots in self.cells)

    @property
    def micro_batches(self) -> list[tuple[int, ...]]:
        """The micro-batches of all ranks, rank by rank."""
        return [cell for slots in self.cells for cell in slots]

    @property
    def shares(self) -> list[tuple[int, ...]]:
        """The rows of every rank that has any."""
        return [sum(slots, ()) for slots in self.cells if slots]


@dataclass(frozen=True)
class Window:
    """A batch and its cut."""

    batch: Batch
    cut: Cut


@dataclass(frozen=True)
class CutPlan:
    """The settings of the naive trainer.

    Args:
        micro_batch: rows of one micro-batch.
        accumulation: micro-batches of one rank in one optimizer step; 0: as many as the rows need.
        ranks: data-parallel ranks.
    """

    micro_batch: int
    accumulation: int = 0
    ranks: int = 1

    @property
    def rows(self) -> int:
        """Rows of a full window; 0: all rows are one window."""
        return self.micro_batch * self.accumulation * self.ranks

    def cut(self, n_rows: int) -> Cut:
        """The cut of so many rows."""
        return cut_rows(n_rows, self.micro_batch, self.accumulation, self.ranks)


@dataclass(frozen=True)
class PolicyFacts:
    """What a fault may ask about the model as it stands.

    Args:
        statistics: log-probabilities and entropies of the trained tokens of some rows, shape (n,) each.
        pad: id of the padding token.
        longest: positions that the model has.
        constant_tokens: tokens a response that a constant divisor counts.
    """

    statistics: Callable[[Sequence[Row]], list[tuple[Tensor, Tensor]]]
    pad: int
    longest: int
    constant_tokens: float


Change = Callable[[Window, PolicyFacts], Window]


def cut_rows(n_rows: int, micro_batch: int, accumulation: int = 0, ranks: int = 1) -> Cut:
    """Consecutive micro-batches, dealt to the ranks in turn; the last may be short.

    Args:
        n_rows: rows of the batch. More than the plan holds get more slots than planned.
        micro_batch: rows of one micro-batch.
        accumulation: planned slots of a rank; 0: as many as the rows need.
        ranks: data-parallel ranks.
    """
    found = [tuple(range(i, min(i + micro_batch, n_rows))) for i in range(0, n_rows, micro_batch)]
    cells = tuple(tuple(found[rank::ranks]) for rank in range(ranks))
    return Cut(cells, accumulation or max(1, -(-len(found) // ranks)))

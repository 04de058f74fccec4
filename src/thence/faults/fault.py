"""What a fault is, and what a window must have for it to show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from thence.faults.around import Link
from thence.faults.cut import Change, Cut, CutPlan
from thence.faults.features import Feature
from thence.objective import Batch


@dataclass(frozen=True)
class Needs:
    """What a window must have for a fault to show in its gradient.

    Args:
        micro_batches: of one rank, at least.
        ranks: at least.
        micro_batch: rows in one micro-batch, at least.
        incomplete: fewer micro-batches than planned.
        short: micro-batches with unequal numbers of rows.
        steps: optimizer steps in a row.
        advantages: weights that differ from row to row, some negative.
        clip: a step whose gradient is clipped.
        features: of the batch, for faults of reinforcement learning.
        generations: rollout batches in a row.
    """

    micro_batches: int = 1
    ranks: int = 1
    micro_batch: int = 1
    incomplete: bool = False
    short: bool = False
    steps: int = 1
    advantages: bool = False
    clip: bool = False
    features: tuple[Feature, ...] = ()
    generations: int = 1

    def lacking(self, batch: Batch) -> list[str]:
        """What a batch lacks, so that the fault has no meaning for it, in words."""
        for feature in self.features:  # the first: later ones presuppose it
            if not feature.of_batch(batch):
                return [feature.words]
        return []

    def stage_lacks(self, stage: Any) -> list[str]:
        """The same of the batches of a recipe's RL stage, as far as its settings tell."""
        return [feature.words for feature in self.features if not feature.of_stage(stage)]

    def unmet(self, cut: Cut, clip_norm: float = 0.0) -> list[str]:
        """What a cut lacks, in words; empty: the fault shows.

        Args:
            clip_norm: of the step; 0: nothing is clipped.
        """
        sizes = [len(cell) for cell in cut.micro_batches]
        fewest = min((len(slots) for slots in cut.cells), default=0)
        lacking = [
            (fewest < self.micro_batches, f"{self.micro_batches} micro-batches a rank"),
            (len(cut.shares) < self.ranks, f"{self.ranks} ranks with rows"),
            (max(sizes, default=0) < self.micro_batch, f"{self.micro_batch} rows in a micro-batch"),
            (self.incomplete and cut.slots >= cut.accumulation, "fewer micro-batches than planned"),
            (self.short and len(set(sizes)) < 2, "micro-batches of unequal numbers of rows"),
            (self.clip and not clip_norm, "a norm to clip at"),
        ]  # fmt: skip
        return [words for lacks, words in lacking if lacks]


@dataclass(frozen=True)
class Fault:
    """A bug that can be switched on.

    Args:
        name: as in a recipe.
        title: in a few words.
        finds: findings of the audit that name it: at least one of them appears (keys of
            ``thence.audit.judge.findings.CATALOGUE``).
        also: further findings, of which one stands beside.
        needs: what a window must have to show it.
        source: where it was seen.
        change: of rows and weights, before the step; or
        wrap: what makes the link around the step, one for each :class:`~thence.faults.step.FaultyStep`.
        outermost: whether the link goes around the changes of other faults too.
        remembers: whether it carries something from step to step, which no checkpoint keeps.
        unseen: whether the trainer's log shows the loss as if nothing were wrong: what goes missing is gradient.
    """

    name: str
    title: str
    finds: tuple[str, ...]
    needs: Needs
    source: str
    change: Change | None = None
    wrap: Callable[[CutPlan], Link] | None = None
    also: tuple[str, ...] = ()
    outermost: bool = False
    remembers: bool = False
    unseen: bool = False

"""Ranks that share rows: each holds a piece of every row's tokens (context parallel training).

A rank still draws rows of its own. Before the passes of a step the ranks of a group show each other their rows, and
make the passes of all of them together. Nobody outside of the passes knows of it: the data, the counts over ranks and
the sums of gradients are those of ranks that share no rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from thence.models.ulysses import Piece

T = TypeVar("T")


@dataclass(frozen=True)
class ContextGroup:
    """The ranks that share rows with this one."""

    piece: Piece

    @classmethod
    def of(cls, device: torch.device, world: int, size: int) -> ContextGroup:
        """This rank's group, where neighbours make groups of so many ranks; ``size`` divides ``world``."""
        mesh = init_device_mesh(device.type, (world // size, size), mesh_dim_names=("rows", "context"))
        return cls(Piece(mesh.get_group("context"), mesh.get_local_rank("context"), size))

    def rows(self, own: Sequence[T]) -> tuple[list[T], int]:
        """The rows of all ranks of the group, and how many of them come before this rank's own."""
        shown: list[Any] = [None] * self.piece.size
        dist.all_gather_object(shown, list(own), group=self.piece.group)
        return [row for part in shown for row in part], sum(len(part) for part in shown[: self.piece.rank])

    def whole(self, values: Tensor, start: int, length: int) -> Tensor:
        """Put pieces of values together along the last dimension.

        Args:
            values: this rank's.
            start: where they begin.
            length: of all ranks' values.
        """
        result = values.new_zeros(*values.shape[:-1], length)
        result[..., start : start + values.shape[-1]] = values
        dist.all_reduce(result, group=self.piece.group)  # each value is on one rank, and zero on the others
        return result

"""Sums over ranks. A step needs four: of integer counts, of gradients, of their squares, of what is logged.

There is no average.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thence.errors import UserError
from thence.train.parallel.context import ContextGroup
from thence.train.parallel.meeting import SILENCE, meet

BUCKET_ELEMENTS = 16 * 2**20


class Ranks(Protocol):
    """The processes that share one optimizer step."""

    rank: int
    world: int
    context: ContextGroup | None
    """Those that share rows with this one; None: every rank holds its rows whole."""

    def sum_counts(self, counts: Sequence[int]) -> list[int]:
        """Exact integer sums over ranks."""
        ...

    def sum_floats(self, values: Tensor) -> Tensor:
        """Sum of a small float64 tensor over ranks, for the log."""
        ...

    def sum_shards(self, values: Tensor) -> Tensor:
        """Sum of a small float64 tensor over the ranks that hold different parts of the weights."""
        ...

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over ranks; a parameter without a gradient on some rank counts as zero."""
        ...

    def global_norm(self, gradients: Sequence[Tensor]) -> float:
        """Euclidean norm of the whole gradient, once it is summed over ranks."""
        ...

    def equal_passes(self, passes: int) -> int:
        """How many passes this rank makes, of which so many are its own."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """A plain value of every rank, in rank order, on every rank."""
        ...

    def wait(self) -> None:
        """Return when every rank has come here."""
        ...

    def apart(self) -> Ranks:
        """The same processes on their hosts, for another thread: they do not wait for what these ranks do."""
        ...


class SingleProcess:
    """One process: every sum over ranks is the value itself."""

    rank = 0
    world = 1
    context: ContextGroup | None = None

    def sum_counts(self, counts: Sequence[int]) -> list[int]:
        return list(counts)

    def sum_floats(self, values: Tensor) -> Tensor:
        return values

    def sum_shards(self, values: Tensor) -> Tensor:
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        pass

    def global_norm(self, gradients: Sequence[Tensor]) -> float:
        return local_norm(gradients)

    def equal_passes(self, passes: int) -> int:
        return passes

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def wait(self) -> None:
        pass

    def apart(self) -> Ranks:
        return self


class DataParallel:
    """Each rank holds the whole model and trains its share of the rows; gradients are summed after all micro-batches.

    Nothing happens during the backward passes, so ranks may have different numbers of micro-batches, or none. Ranks
    that share rows have the same ones.

    Args:
        device: of the tensors that are sent.
        group: of all processes; default: the one that they have met in.
        context: the ranks that share rows with this one.
    """

    def __init__(
        self, device: torch.device, *, group: dist.ProcessGroup | None = None, context: ContextGroup | None = None
    ):
        self.rank, self.world, self.device, self.group = dist.get_rank(), dist.get_world_size(), device, group
        self.context: ContextGroup | None = context

    @classmethod
    def alone(cls, device: torch.device) -> Self:
        """A single process that is a group of ranks nevertheless, without ``torchrun``."""
        if not dist.is_initialized():
            dist.init_process_group(_backend(device), store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore
        return cls(device)

    def sum_counts(self, counts: Sequence[int]) -> list[int]:
        total = torch.tensor(list(counts), dtype=torch.int64, device=self.device)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def sum_floats(self, values: Tensor) -> Tensor:
        total = values.to(self.device, torch.float64)
        dist.all_reduce(total, group=self.group)
        return total.cpu()

    def sum_shards(self, values: Tensor) -> Tensor:
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        bucket: list[nn.Parameter] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if bucket and (
                bucket[0].dtype != parameter.dtype
                or sum(p.numel() for p in bucket) + parameter.numel() > BUCKET_ELEMENTS
            ):
                _sum_bucket(bucket, self.group)
                bucket = []
            bucket.append(parameter)
        if bucket:
            _sum_bucket(bucket, self.group)

    def global_norm(self, gradients: Sequence[Tensor]) -> float:
        return local_norm(gradients)

    def equal_passes(self, passes: int) -> int:
        return passes

    def gather(self, value: Any) -> list[Any]:
        result: list[Any] = [None] * self.world
        dist.all_gather_object(result, value, group=self.group)
        return result

    def wait(self) -> None:
        dist.barrier(self.group)

    def apart(self) -> Ranks:
        group: Any = dist.new_group(backend="gloo", timeout=SILENCE)
        return DataParallel(torch.device("cpu"), group=group)


def local_norm(gradients: Sequence[Tensor]) -> float:
    """Euclidean norm of these tensors together, in float64."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms)).item() if norms else 0.0


def _sum_bucket(parameters: list[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def rank_variable(name: Literal["RANK", "LOCAL_RANK", "WORLD_SIZE"]) -> int:
    """What ``torchrun`` put into this variable of the environment; without it, that of a single process.

    Raises:
        UserError: it is not a whole number, or one that there cannot be.
    """
    least = 1 if name == "WORLD_SIZE" else 0
    text = os.environ.get(name, str(least))
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise UserError(
            f"the environment variable {name} is {text!r}, not a whole number from {least} on",
            remedy=f"let torchrun set it, or unset {name} to run one process",
            field=name,
        )
    return int(text)


def start_ranks() -> tuple[Ranks, torch.device]:
    """The ranks that ``torchrun`` describes in the environment, and this rank's device; one process without it.

    Raises:
        UserError: there are GPUs, but none for this rank; or a variable of the environment is no such number.
    """
    local = rank_variable("LOCAL_RANK")
    if torch.cuda.is_available() and local >= torch.cuda.device_count():
        raise UserError(
            f"process {local} of this machine has no GPU: torch sees {torch.cuda.device_count()}",
            remedy="start one process for each GPU (torchrun --nproc-per-node), or set CUDA_VISIBLE_DEVICES to more",
        )
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if rank_variable("WORLD_SIZE") == 1:
        return SingleProcess(), device
    if not dist.is_initialized():
        meet(_backend(device), rank_variable("RANK"), rank_variable("WORLD_SIZE"))
    return DataParallel(device), device


def sharing_rows(ranks: Ranks, size: int) -> Ranks:
    """The same ranks, where groups of so many neighbours share their rows; ``size`` divides their number."""
    if size == 1 or not isinstance(ranks, DataParallel):
        return ranks
    return DataParallel(ranks.device, context=ContextGroup.of(ranks.device, ranks.world, size))


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"

"""Tensors of a checkpoint by ``torch.distributed.checkpoint``: each rank writes its part, any layout reads it again.

The files are safetensors, so nothing is unpickled. A tensor that is cut over ranks lies in several files, each with
the offsets of its part; one that is whole lies in one file, as Hugging Face writes it. One reader reads both.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from thence.errors import CheckpointError
from thence.train.weights import first_names, named_parts


def write_parts(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> list[Path]:
    """Write this rank's part of every tensor. All ranks call it.

    Args:
        group: of all processes; default: the one that they have met in.

    Returns:
        The files of this rank.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _quiet(_ranks()) as how:
        save(
            {name: value.detach() for name, value in tensors.items()}, storage_writer=writer, process_group=group, **how
        )
    number = dist.get_rank() + 1 if _ranks() else 1
    return sorted(folder.glob(f"shard-{number:05d}-*.safetensors"))


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory, of shards as shards; what shares memory goes on to share it."""
    stager = DefaultStager(StagingOptions(False, False, False, False))  # nothing pinned or shared: one copy, here
    try:
        return dict(stager.stage({name: value.detach() for name, value in tensors.items()}))  # pyright: ignore
    finally:
        stager.close()


def stored(folder: Path) -> dict[str, torch.Size]:
    """The tensors in a checkpoint's files and their whole shapes."""
    return {name: found.size for name, found in _described(folder).items()}


def types_of(folder: Path) -> dict[str, torch.dtype]:
    """The tensors in a checkpoint's files and the types of their numbers."""
    return {name: found.properties.dtype for name, found in _described(folder).items()}


def read_parts(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill these tensors in place, each rank its part. All ranks call it, where one of the tensors is cut.

    Raises:
        CheckpointError: a tensor is not there, or has another shape.
    """
    found = stored(folder)
    for name, target in targets.items():
        if name not in found:
            raise misfit(folder, f"it lacks {name}")
        if found[name] != target.shape:
            raise misfit(folder, f"{name} of shape {tuple(found[name])} is of shape {tuple(target.shape)} here")
    filled: dict[str, Any] = {name: target.detach() for name, target in targets.items()}
    with _quiet(any(isinstance(value, DTensor) for value in filled.values())) as how:
        load(filled, storage_reader=HuggingFaceStorageReader(str(folder)), **how)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy the weights of a checkpoint into the model, bit by bit; every one of the model's must be there.

    Raises:
        CheckpointError: names or shapes are not those of the model.
    """
    found, first = stored(folder), first_names(model)
    parts = dict(named_parts(model))
    unknown = next((name for name in found if "/" not in name and name not in parts and name not in first), None)
    if unknown is not None:
        raise misfit(folder, f"{unknown} of shape {tuple(found[unknown])} is none of the model's weights")
    # a tied weight is stored once, under one of its names
    names = {owner: name for name, owner in first.items() if name in found} | {n: n for n in parts if n in found}
    read_parts(folder, {names.get(name, name): value for name, value in parts.items()})


def optimizer_tensors(folder: Path) -> dict[str, Tensor]:
    """The optimizers' tensors in a checkpoint, whole, by ``kind/parameter/field``, and what else is kept so."""
    return named_tensors(folder, "")


def named_tensors(folder: Path, beginning: str) -> dict[str, Tensor]:
    """The tensors in a checkpoint, weights apart, whose names begin so. Whole ones: no rank asks another."""
    found = _described(folder)
    made = {
        name: torch.empty(f.size, dtype=f.properties.dtype)
        for name, f in found.items()
        if "/" in name and name.startswith(beginning)
    }
    read_parts(folder, made)
    return made


def misfit(folder: Path, why: str) -> CheckpointError:
    """A checkpoint that is not of this model."""
    return CheckpointError(
        f"the checkpoint does not fit the model: {why}",
        remedy="resume with the version of thence and the model that wrote it, or give another --folder",
        file=folder,
    )


def _described(folder: Path) -> dict[str, Any]:
    return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata


@contextmanager
def _quiet(ranks: bool) -> Iterator[dict[str, Any]]:
    """Whether torch talks to other ranks; where it shall not, it warns of what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield {"no_dist": not ranks}


def _ranks() -> bool:
    return dist.is_available() and dist.is_initialized()

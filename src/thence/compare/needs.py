"""What a run needs of its machine: what was asked for, else what its recipe says and the plan counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thence.accounting.budget import plan
from thence.accounting.published import own_configuration
from thence.errors import UserError
from thence.launch.base import Needs
from thence.recipe import Recipe, build_recipe
from thence.train.model_files import resolve

LIBRARIES = 1_000_000_000
"""Bytes of host memory for Python, torch and what else a plan does not count."""


@dataclass(frozen=True)
class Asked:
    """What was asked for each process; None: what its recipe says.

    Args:
        cores: CPU cores.
        gpus: GPUs.
        memory_gb: host memory in GB; 0: none is set aside.
    """

    cores: float
    gpus: float
    memory_gb: float | None = None


def needs_of(tables: Mapping[str, Any], folder: Path, asked: Asked) -> Needs:
    """What a run of a recipe needs.

    Args:
        tables: of the recipe.
        folder: from which its model's path is meant.
    """
    if asked.memory_gb is not None:
        return Needs(asked.cores, asked.gpus, int(asked.memory_gb * 1e9) or None)
    return Needs(asked.cores, asked.gpus, planned_memory(build_recipe(dict(tables)), folder, on_gpu=asked.gpus > 0))


def planned_memory(recipe: Recipe, folder: Path, *, on_gpu: bool, ranks: int = 1) -> int | None:
    """Bytes of host memory that one process of a run is planned to hold; None where the plan cannot tell.

    On a CPU it is the largest peak of its stages, on a GPU what is held in host memory; and the libraries.
    """
    try:
        found = plan(recipe, _configuration(recipe, folder), ranks=ranks, on_host=not on_gpu)
    except UserError:
        return None
    memories = [stage.memory for stage in found.stages if stage.memory is not None]
    if not memories:
        return None
    held = (memory.held("host") + (0 if on_gpu else memory.peak) for memory in memories)
    return max(held) + LIBRARIES


def _configuration(recipe: Recipe, folder: Path) -> dict[str, Any] | None:
    """The model's ``config.json``, where it lies on this machine; the plan knows published ones itself."""
    path = recipe.model.path
    if path is None or recipe.model.init:
        return None
    if path.startswith(("world:", "package:")):
        return own_configuration(Path(resolve(path)))
    return own_configuration(folder / path)

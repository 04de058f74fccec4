"""Which vLLM engine each rank of an RL stage uses, on which machine and GPU, and what such an engine cannot do."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from thence.errors import RecipeError
from thence.rollout.vllm.settings import VllmSettings
from thence.train.parallel.ranks import Ranks


@dataclass(frozen=True)
class Place:
    """Which engine a rank uses.

    Args:
        settings: of this rank's engine.
        leader: the rank that starts it; this rank itself, or a neighbour. A server has none.
        shared: other ranks use it too.
    """

    settings: VllmSettings
    leader: int
    shared: bool


def machine() -> str:
    """What tells this machine from others, for its own files and sockets."""
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot}"


def ranks_per_engine(settings: VllmSettings, world: int, where: str) -> int:
    """How many neighbouring ranks use one engine.

    Args:
        where: the table's name, for the error.

    Raises:
        RecipeError: ranks cannot be dealt evenly to the engines.
    """
    servers = len(settings.servers) or (1 if settings.server else 0)
    size = world // servers if servers else settings.ranks_per_engine
    if size >= 1 and world % size == 0 and servers in (0, world // size):
        return size
    if servers:
        raise RecipeError(
            f"{world} ranks cannot be dealt evenly to {servers} servers",
            remedy=f"name as many servers as divide {world}",
            field=f"{where}.servers",
        )
    raise RecipeError(
        f"{world} ranks cannot be dealt evenly to engines of {size} ranks",
        remedy=f"choose a number that divides {world}",
        field=f"{where}.ranks_per_engine",
    )


def place_of(settings: VllmSettings, ranks: Ranks, hosts: Sequence[str], where: str) -> Place:
    """Which engine a rank uses.

    Args:
        hosts: the machine of every rank.
        where: the table's name, for errors.

    Raises:
        RecipeError: as :func:`ranks_per_engine`; or ranks that would share an engine are not on one machine.
    """
    size = ranks_per_engine(settings, ranks.world, where)
    leader = ranks.rank // size * size
    if len(set(hosts[leader : leader + size])) > 1:
        raise RecipeError(
            f"ranks {leader} to {leader + size - 1} share an engine, and are not on one machine",
            remedy="let so many ranks share one as divide the ranks of each machine",
            field=f"{where}.{'servers' if settings.servers or settings.server else 'ranks_per_engine'}",
        )
    server = settings.servers[ranks.rank // size] if settings.servers else settings.server
    own = settings.model_copy(update={"server": server, "servers": (), "ranks_per_engine": 1})
    return Place(own, leader, size > 1)


def shared_ahead(field: str) -> RecipeError:
    """What an engine of several ranks cannot do: a rank would load weights while another one samples."""
    return RecipeError(
        "ranks that share an engine cannot sample ahead: one would load weights while another one samples",
        remedy="set ahead = 0, or give every rank an engine of its own",
        field=field,
    )


def chunks_ahead(field: str) -> RecipeError:
    """What vLLM cannot do with weights that come in chunks: it would take them while it samples."""
    return RecipeError(
        "vLLM cannot take weights in chunks while it samples ahead",
        remedy='set transfer = "files", or ahead = 0',
        field=field,
    )


def own_gpu(device: torch.device, settings: VllmSettings) -> dict[str, str]:
    """The variable that gives an engine the GPU of its rank, unless the user says which; never tried on a GPU."""
    name = "CUDA_VISIBLE_DEVICES"
    if device.type != "cuda" or name in settings.environment:
        return {}
    seen = [part.strip() for part in os.environ.get(name, "").split(",") if part.strip()]
    index = device.index or 0
    return {name: seen[index] if index < len(seen) else str(index)}

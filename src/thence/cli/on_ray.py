"""``--on ray``: the commands that run on a Ray cluster."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from thence.cli.events import Way
from thence.compare.needs import Asked, planned_memory
from thence.compare.place import Place, on_cluster
from thence.errors import UserError
from thence.launch.base import Needs
from thence.launch.cluster import Cluster, address_of
from thence.launch.placement import refuse_too_many, room_for
from thence.launch.ranks import run_ranks
from thence.launch.ranks_on_ray import RankOrder, RaySet
from thence.recipe import Recipe
from thence.settings.limits import Processes

MOST = 65_536
SAID: dict[Way, list[str]] = {"shown": [], "quiet": ["--quiet"], "json": ["--json"]}
Wanted = tuple[float | None, float | None, float | None]
"""Cores, GPUs and GB of memory of a process, as the flags say; None: the default."""


@contextlib.contextmanager
def place_of(on: str, jobs: Processes | None, threads: int, wanted: Wanted) -> Iterator[tuple[Place, int]]:
    """The cluster as a place for a comparison's runs, and how many it holds side by side."""
    with Cluster(address_of(on)) as cluster:
        asked = asked_for(cluster, wanted, threads)
        known = Needs(asked.cores, asked.gpus, int((asked.memory_gb or 0) * 1e9) or None)
        side_by_side = max(1, room_for(cluster.nodes(), known, jobs or MOST))
        yield on_cluster(cluster, asked, threads=threads, most=jobs, say=_say), side_by_side


def asked_for(cluster: Cluster, wanted: Wanted, threads: int) -> Asked:
    """What the flags say that a process needs; a cluster with GPUs gives each process one."""
    cores, gpus, memory_gb = wanted
    if gpus is None:
        gpus = 1.0 if any(node.gpus >= 1 for node in cluster.nodes()) else 0.0
    return Asked(float(threads) if cores is None else cores, gpus, memory_gb)


def run_on(
    on: str,
    recipe: Recipe,
    arguments: Sequence[str],
    again: Sequence[str],
    ranks: int,
    wanted: Wanted,
    restarts: int,
    way: Way,
) -> int:
    """Run a recipe on ranks in a cluster, and show what the first rank prints. Returns its exit code.

    Args:
        arguments: of ``thence run`` on every rank, without how it speaks.
        again: those of them that hold for the first start alone.
        restarts: how often all ranks may start again when a node is lost.

    Raises:
        UserError: the cluster cannot be reached, its nodes do not fit, or nodes were lost too often.
    """
    folder, cores = Path(recipe.run_folder()).resolve(), wanted[0]
    threads = _threads(cores)
    with Cluster(address_of(on)) as cluster:
        asked = asked_for(cluster, wanted, threads)
        if asked.gpus not in (0, 1):
            raise UserError("a rank computes on one GPU or on none", remedy="give 0 or 1", field="--gpus")
        memory = int((asked.memory_gb or 0) * 1e9) or None
        if asked.memory_gb is None:
            memory = planned_memory(recipe, Path.cwd(), on_gpu=asked.gpus > 0, ranks=ranks)
        needs = Needs(asked.cores, asked.gpus, memory)
        refuse_too_many(cluster.nodes(), needs, ranks)
        before = _start_of(folder)

        def begin(is_again: bool) -> RaySet:
            own = [*arguments, *SAID[way]]
            if not is_again or _start_of(folder) in (before, None):  # what stood in the folder is as it was
                own += again
            there = next(place for place in (folder, *folder.parents) if place.is_dir())
            order = RankOrder("thence.cli.rank", ["run", *own], Path.cwd(), there, ranks, needs, threads)
            return RaySet(cluster, order, _say if way == "shown" else lambda text: None, _say)

        return run_ranks(begin, ranks, restarts, _Shown())


def arguments_of(recipe: str, overrides: Mapping[str, str]) -> list[str]:
    """The command line of ``thence run`` for a recipe with such fields."""
    return [recipe, *(f"--{name}={value}" for name, value in overrides.items())]


def _threads(cores: float | None) -> int:
    """Threads of a rank: what the environment says, else its cores; torchrun's one where neither is said."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdecimal() and int(told) else max(1, int(cores or 1))


def _start_of(folder: Path) -> bytes | None:
    """What tells one start of a run from another; None where none has come so far."""
    try:
        return (folder / "environment.json").read_bytes()
    except OSError:
        return None


class _Shown:
    """Shows what the first rank prints, and what happens to ranks."""

    def __init__(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")
        self.decoders = {name: decoder(errors="replace") for name in ("out", "err")}

    def printed(self, stream: str, text: bytes) -> None:
        to = sys.stdout if stream == "out" else sys.stderr
        to.write(self.decoders[stream].decode(text))
        to.flush()

    def said(self, text: str) -> None:
        _say(text)


def _say(text: str) -> None:
    print(f"thence: {text}", file=sys.stderr)

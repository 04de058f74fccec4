"""The ranks of one run on a Ray cluster: a placement group, and the environment that torchrun would set."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from thence.errors import UserError
from thence.explain import told
from thence.launch.base import Needs
from thence.launch.cluster import Cluster
from thence.launch.on_ray import PATIENCE, SPEAKS
from thence.launch.package import raised_there
from thence.launch.placement import room_for
from thence.launch.ranks import RankMessage
from thence.launch.supervisor import RankSupervisor


@dataclass(frozen=True)
class RankOrder:
    """What every rank runs.

    Args:
        module: the program, with its arguments.
        folder: its working directory, on every node.
        shared: a folder that every node must share.
        ranks: how many.
        needs: of each.
        threads: of each.
    """

    module: str
    arguments: Sequence[str]
    folder: Path
    shared: Path
    ranks: int
    needs: Needs
    threads: int


class RaySet:
    """The ranks of one start. Raises UserError where they cannot start.

    Args:
        say: is told where ranks are, and what they wait for.
        warn: is told what the numbers may depend on.
    """

    def __init__(self, cluster: Cluster, order: RankOrder, say: Callable[[str], None], warn: Callable[[str], None]):
        self.cluster, self.order, self.say, self.warn = cluster, order, say, warn
        self._actors: list[Any] = []
        self._group: Any = None
        self._asked: dict[Any, int] = {}
        self._lost = ""

    def __enter__(self) -> Self:
        try:
            self._start()
        except self.cluster.ray.exceptions.RayError as error:
            own = raised_there(self.cluster.ray, error)
            if own is not None:
                self.__exit__()
                raise UserError(
                    f"a rank cannot be started on its node: {told(own)}",
                    remedy="start the command in a folder that every node has under the same path",
                    field="--on",
                ) from None
            self._lost = f"a node was lost while ranks started (Ray: {type(error).__name__})"
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(Exception):  # they are gone, or the whole cluster is
            for actor in self._actors:
                self.cluster.ray.kill(actor)
            if self._group is not None:
                self.cluster.ray.util.remove_placement_group(self._group)
        self._actors, self._group = [], None

    def events(self, seconds: float) -> Iterator[tuple[int, RankMessage]]:
        if self._lost:
            yield 0, {"lost": self._lost}
            return
        ray = self.cluster.ray
        for answer in self.cluster.first_of(list(self._asked), seconds):
            rank = self._asked.pop(answer)
            try:
                said = ray.get(answer)
            except ray.exceptions.RayError as error:
                why = f"the node of rank {rank} was lost, or ended its process (Ray: {type(error).__name__})"
                yield rank, {"lost": why}
                continue
            yield from ((rank, message) for message in said)
            if not any("ended" in message for message in said):
                self._asked[self._actors[rank].messages.remote(SPEAKS)] = rank

    def _start(self) -> None:
        order, ray = self.order, self.cluster.ray
        bundle: dict[str, float] = {"CPU": order.needs.cores}
        bundle |= {"GPU": order.needs.gpus} if order.needs.gpus else {}
        bundle |= {"memory": order.needs.memory} if order.needs.memory else {}
        self._group = ray.util.placement_group([bundle] * order.ranks, strategy="PACK")
        began, is_told = time.monotonic(), False
        placed = self._group.ready()
        while not self.cluster.first_of([placed], 1.0):
            if not is_told and time.monotonic() - began > PATIENCE:
                is_told = True
                room = room_for(self.cluster.nodes(), order.needs, order.ranks)
                why = "others use it" if room >= order.ranks else f"its nodes hold {room}: another node is waited for"
                self.say(f"{order.ranks} ranks wait for room in the cluster, each for {order.needs}; {why}")
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        needs = order.needs
        for number in range(order.ranks):
            there = strategy(placement_group=self._group, placement_group_bundle_index=number)
            kind = self.cluster.actor(RankSupervisor, needs.cores, needs.gpus, needs.memory, scheduling_strategy=there)
            self._actors.append(kind.remote())
        places = [Seat(**place) for place in self.cluster.all_of([actor.where.remote() for actor in self._actors])]
        ids = {place.id for place in places}
        nodes = [node for node in self.cluster.nodes() if node.id in ids]
        if differs := self.cluster.refuse_what_differs(nodes, order.shared):
            self.warn(differs)
        dealt = deal(places)
        self._actors = [self._actors[number] for number in dealt]
        places = [places[number] for number in dealt]
        variables = environments(places, order.threads)
        begun = [
            actor.start.remote(order.module, list(order.arguments), str(order.folder), own)
            for actor, own in zip(self._actors, variables, strict=True)
        ]
        self.cluster.all_of(begun)
        self._asked = {actor.messages.remote(SPEAKS): rank for rank, actor in enumerate(self._actors)}
        self.say(f"ranks: {told_places(places)}")


@dataclass(frozen=True)
class Seat:
    """Where one rank runs, as its supervisor says."""

    id: str
    host: str
    address: str
    port: int
    gpus: Sequence[str] = field(default=())


def deal(places: Sequence[Seat]) -> list[int]:
    """The order of ranks: those of a node are neighbours, since neighbours may share rows or a copy of the weights."""
    nodes = list(dict.fromkeys(place.id for place in places))
    return sorted(range(len(places)), key=lambda number: nodes.index(places[number].id))


def environments(places: Sequence[Seat], threads: int) -> list[dict[str, str]]:
    """What torchrun sets for each rank, in their order. Ranks of a node see all GPUs that the node's ranks were given.

    Args:
        places: of the ranks, those of a node next to each other.
        threads: of each rank.
    """
    nodes, seen = list(dict.fromkeys(place.id for place in places)), Counter[str]()
    local = Counter(place.id for place in places)
    gpus = {id: [gpu for place in places if place.id == id for gpu in place.gpus] for id in nodes}
    found = []
    for rank, place in enumerate(places):
        own: dict[str, str] = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(places)),
            "LOCAL_RANK": str(seen[place.id]),
            "LOCAL_WORLD_SIZE": str(local[place.id]),
            "GROUP_RANK": str(nodes.index(place.id)),
            "GROUP_WORLD_SIZE": str(len(nodes)),
            "MASTER_ADDR": places[0].address,
            "MASTER_PORT": str(places[0].port),
            "OMP_NUM_THREADS": str(threads),
        }
        if gpus[place.id]:
            own["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[place.id])
        seen[place.id] += 1
        found.append({**_forwarded(os.environ), **own})
    return found


def told_places(places: Sequence[Seat]) -> str:
    """Which ranks are where."""
    nodes = dict.fromkeys(place.id for place in places)
    parts = []
    for id in nodes:
        ranks = [rank for rank, place in enumerate(places) if place.id == id]
        span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        parts.append(f"{span} on {places[ranks[0]].host} [{id[:6]}]")
    return ", ".join(parts)


def _forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith("THENCE_")}

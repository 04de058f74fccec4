"""Jobs on the nodes of a Ray cluster. Ray places each where there is room for its needs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from thence.errors import UserError
from thence.explain import told
from thence.launch.base import LAST, Message, Needs, Order
from thence.launch.cluster import Cluster
from thence.launch.package import raised_there
from thence.launch.placement import has_room, refuse_what_fits_nowhere
from thence.launch.supervisor import JobSupervisor

PATIENCE = 5.0
"""Seconds after which a job that has no place yet is said to wait."""
IDLE_SECONDS = 30.0
"""How long a process without a job keeps its room in the cluster: the next job of the same needs starts faster."""
LOOK_SECONDS = 5.0
"""How often the nodes are looked at."""
SPEAKS = 20.0
"""A supervisor answers after so many seconds, also where its process says nothing."""


@dataclass(eq=False)
class _Slot:
    """A process in the cluster, with its supervisor."""

    actor: Any
    needs: Needs
    asked: Any
    """What is being waited for: Ray's reference to the next answer."""
    step: str = "placing"
    """placing, starting, running or idle."""
    order: Order | None = None
    since: float = field(default_factory=time.monotonic)
    told: bool = False
    node: str = ""


class RayLauncher:
    """A process for each job, on whichever node has room; a process without a job is used again.

    Args:
        cluster: connected.
        module: the program of a process (:mod:`thence.launch.process`).
        folder: the working directory on every node; what processes print is in ``logs/`` there.
        threads: of each process.
        most: processes side by side; None: as many as the nodes hold.
        say: is told what concerns no single job.
    """

    def __init__(
        self,
        cluster: Cluster,
        module: str,
        folder: Path,
        *,
        threads: int,
        most: int | None = None,
        say: Callable[[str], None],
    ):
        self.cluster, self.module, self.folder = cluster, module, folder
        self.threads, self.most, self.say = threads, most, say
        self._slots: list[_Slot] = []
        self._number, self._looked, self._nodes = 0, 0.0, cluster.nodes()
        self._seen = {node.id: node for node in self._nodes}
        self._refused: list[tuple[Hashable, Message]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for slot in list(self._slots):
            self._end(slot)

    def check(self, needs: Iterable[Needs]) -> None:
        wanted = list(needs)
        nodes = self._look(now=True)
        refuse_what_fits_nowhere(nodes, wanted)
        # nodes that hold none of the jobs need not share the folder
        able = [node for node in nodes if any(node.holds(each) for each in wanted)]
        if said := self.cluster.refuse_what_differs(able, self.folder):
            self.say(said)

    def has_room(self, needs: Needs) -> bool:
        busy = [slot.needs for slot in self._slots if slot.order is not None]
        if not busy:
            return True
        return (self.most is None or len(busy) < self.most) and has_room(self._look(), busy, needs)

    def start(self, order: Order) -> None:
        idle = [slot for slot in self._slots if slot.order is None]
        fits = next((slot for slot in idle if slot.needs.cover(order.needs)), None)
        if fits is not None:
            self._give(fits, order)
            return
        for slot in idle:  # they hold room that this one may need
            self._end(slot)
        try:  # one that is gone may come again
            refuse_what_fits_nowhere(list(self._seen.values()), [order.needs])
        except UserError as error:
            self._refused.append((order.key, {"failed": str(error)}))
            return
        self._number += 1
        log = self.folder / "logs" / f"ray-{self._number}.log"
        needs = order.needs
        own = {name: value for name, value in os.environ.items() if name.startswith("THENCE_")}
        kind = self.cluster.actor(JobSupervisor, needs.cores, needs.gpus, needs.memory)
        actor = kind.remote(self.module, str(self.folder), str(log), self.threads, own)
        self._slots.append(_Slot(actor, needs, actor.where.remote(), order=order))

    def events(self, seconds: float) -> Iterator[tuple[Hashable, Message]]:
        while self._refused:
            yield self._refused.pop()
        self._look()
        asked = {slot.asked: slot for slot in self._slots if slot.step != "idle"}
        for answer in self.cluster.first_of(list(asked), seconds):
            yield from self._answered(asked[answer], answer)
        for slot in list(self._slots):
            waited = time.monotonic() - slot.since
            if slot.step == "placing" and not slot.told and waited > PATIENCE and slot.order is not None:
                slot.told = True
                yield slot.order.key, {"note": self._why_it_waits(slot.needs)}
            if slot.step == "idle" and (waited > IDLE_SECONDS or any(each.step == "placing" for each in self._slots)):
                self._end(slot)

    def _answered(self, slot: _Slot, answer: Any) -> Iterator[tuple[Hashable, Message]]:
        """Take what a supervisor said, and ask it for more."""
        order = slot.order
        assert order is not None
        try:
            said = self.cluster.ray.get(answer)
        except self.cluster.ray.exceptions.RayError as error:
            self._end(slot)
            own = raised_there(self.cluster.ray, error)
            yield order.key, {"lost": self._why_it_is_lost(slot, error)} if own is None else {"failed": told(own)}
            return
        if slot.step == "placing":
            slot.node = f"{said['host']} [{said['id'][:6]}]"
            nodes = [node for node in self._look(now=True) if node.id == said["id"]]
            if differs := self.cluster.refuse_what_differs(nodes, self.folder):  # it came later than the check
                self.say(differs)
            self._give(slot, order)
            return
        if slot.step == "starting":
            slot.step = "running"
            yield order.key, {"placed": f"on node {slot.node}"}
        for message in said or ():
            if any(word in message for word in LAST):
                slot.step, slot.order, slot.since = "idle", None, time.monotonic()
            yield order.key, message
        if slot.step == "running":
            slot.asked = slot.actor.messages.remote(SPEAKS)

    def _give(self, slot: _Slot, order: Order) -> None:
        slot.order, slot.step, slot.since = order, "starting", time.monotonic()
        slot.asked = slot.actor.start.remote(dict(order.tables), str(order.folder))

    def _end(self, slot: _Slot) -> None:
        self._slots.remove(slot)
        with contextlib.suppress(Exception):  # it is gone, or the whole cluster is
            self.cluster.ray.kill(slot.actor)

    def _look(self, now: bool = False) -> list[Any]:
        if now or time.monotonic() - self._looked > LOOK_SECONDS:
            self._nodes, self._looked = self.cluster.nodes(), time.monotonic()
            self._seen |= {node.id: node for node in self._nodes}
        return self._nodes

    def _why_it_waits(self, needs: Needs) -> str:
        if any(node.holds(needs) for node in self._nodes):
            return f"waits for room in the cluster ({needs})"
        return f"waits for a node that is large enough ({needs}): none that is left is"

    def _why_it_is_lost(self, slot: _Slot, error: BaseException) -> str:
        where = f"node {slot.node}" if slot.node else "its node"
        return f"{where} was lost, or ended its process (Ray: {type(error).__name__})"

"""A Ray cluster as thence uses it: connecting, its nodes, and whether results from them can be compared."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeGuard

from thence.errors import UserError, first_line
from thence.launch import facts
from thence.launch.package import raised_there, ray_module
from thence.launch.placement import Node, refuse_other_software, say_other_hardware
from thence.machine import usable_cores

CONNECT_SECONDS = 10.0
START_SECONDS = 120.0
"""How long Ray may take to connect or to start a cluster here."""
FACTS_SECONDS = 180.0
GONE_SECONDS = 10.0
LOOK_SECONDS = 0.05
LOCAL = ""
"""The address of a cluster that is started here and ends with the command."""


def address_of(on: str) -> str:
    """The address in what ``--on`` was given: ``ray`` or ``ray:ADDRESS``; without one, ``RAY_ADDRESS``, else LOCAL.

    Raises:
        UserError: it says something else.
    """
    name, colon, address = on.partition(":")
    if name != "ray" or (colon and not address):
        raise UserError(
            f"{on!r} is no place for runs",
            remedy="write ray (a cluster on this machine, or that of RAY_ADDRESS), ray:auto (the one that runs here), "
            "ray:HOST:PORT, or ray:ray://HOST:PORT from outside of the cluster",
            field="--on",
        )
    address = address or os.environ.get("RAY_ADDRESS", LOCAL)
    if address not in (LOCAL, "auto", "local"):
        host, port = _host_and_port(address)
        if not host or not 0 < port < 65536:
            raise UserError(
                f"{address!r} is no address of a Ray cluster",
                remedy="write HOST:PORT (`ray start --head` prints it; the port is usually 6379), or ray://HOST:PORT "
                "from outside of the cluster (usually 10001)",
                field="--on",
            )
    return LOCAL if address == "local" else address


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    return host.strip("[]"), int(port) if port.isascii() and port.isdecimal() else 0


class Cluster:
    """A connection to a cluster, for as long as the block lasts. A local cluster ends with it.

    Raises:
        UserError: Ray is not installed, nobody answers, or it is another version; at the end of the block: the cluster
            is gone.
    """

    def __init__(self, address: str):
        self.address, self.ray = address, ray_module()
        self._known: dict[str, dict[str, str]] = {}
        """The hardware of the nodes that have been asked, by their ids."""
        self._own = ""

    def __enter__(self) -> Self:
        if self.address not in (LOCAL, "auto"):
            self._knock()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.address == LOCAL:
            options |= {"address": "local", "num_cpus": usable_cores(), "include_dashboard": False}
        else:
            options |= {"address": self.address}
        try:
            with _as_it_was(), _limited(START_SECONDS):
                self.ray.init(**options)
        except Exception as error:
            raise UserError(
                f"Ray did not connect to {self}: {first_line(error)}",
                remedy="see that the cluster runs (`ray status` on one of its nodes) with this version of Ray and "
                "Python; HOST:PORT works on its nodes only, from elsewhere give ray:ray://HOST:10001; a cluster with "
                "tokens needs RAY_AUTH_MODE=token and its token here",
                field="--on",
            ) from error
        self._silence()
        if not self.address.startswith("ray://"):
            self._own = self.ray.get_runtime_context().get_node_id()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        with contextlib.suppress(Exception), _as_it_was():
            self.ray.shutdown()
        if isinstance(error, ConnectionError) or _is_of_ray(error):
            raise self._broken(first_line(error)) from error

    def _broken(self, why: str) -> UserError:
        return UserError(
            f"the connection to {self} broke: {why}",
            remedy="see that the cluster runs (`ray status`), then run the same command again: it resumes",
            field="--on",
        )

    def __str__(self) -> str:
        return "a Ray cluster on this machine" if self.address == LOCAL else f"the Ray cluster at {self.address}"

    def _silence(self) -> None:
        """Ray prints pages of a node's log into the live table when the node is lost; a note says it in a line."""
        worker: Any = getattr(self.ray._private, "worker", None)
        if worker is not None and hasattr(worker, "print_to_stdstream"):
            worker.print_to_stdstream = lambda *_, **__: None

    def _knock(self) -> None:
        """Raise UserError where nobody listens: Ray itself would try for minutes."""
        try:
            socket.create_connection(_host_and_port(self.address), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            raise UserError(
                f"nobody answers at {self.address}: {error.strerror or error}",
                remedy="start the cluster (`ray start --head` prints its address), or correct the address",
                field="--on",
            ) from None

    def nodes(self) -> list[Node]:
        """The nodes that are alive. Raises UserError where the one that this command is connected through is not."""
        alive = [Node.of(record) for record in self.ray.nodes() if record["Alive"]]
        if self._own and all(node.id != self._own for node in alive):
            raise self._broken("the node of this command was lost")
        return alive

    def first_of(self, answers: Sequence[Any], seconds: float) -> list[Any]:
        """The first answers that have come; waits for so long where there is none.

        Ray's own waiting would turn SIGTERM into Ctrl-C.
        """
        until = time.monotonic() + seconds
        while answers:
            ready, _ = self.ray.wait(list(answers), num_returns=1, timeout=0)
            if ready or time.monotonic() >= until:
                return ready
            time.sleep(LOOK_SECONDS)
        return []

    def all_of(self, answers: Sequence[Any]) -> list[Any]:
        """What all of them say, however long that takes. Raises Ray's errors."""
        waiting = list(answers)
        while waiting:
            for answer in self.first_of(waiting, 60.0):
                waiting.remove(answer)
        return self.ray.get(list(answers))

    def actor(self, kind: type, cores: float, gpus: float, memory: int | None, **options: Any) -> Any:
        """A class as an actor that is started once and never again by Ray itself."""
        given: dict[str, Any] = {"num_cpus": cores, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
        if memory:
            given["memory"] = memory
        return self.ray.remote(kind).options(**given, **options)

    def refuse_what_differs(self, nodes: Sequence[Node], folder: Path) -> str:
        """Ask every node that was not asked before what it is and whether it sees a folder.

        A node that is lost meanwhile is left out.

        Args:
            folder: the runs' folder, or the nearest folder above it that is there.

        Returns:
            What to say of nodes whose last bits may differ; empty where there is nothing to say.

        Raises:
            UserError: a node has other software than this command, or does not see the folder.
        """
        asked = [node for node in nodes if node.id not in self._known]
        if not asked:
            return ""
        mine, word = facts.software(), uuid.uuid4().hex
        probe = folder / f".thence-probe-{word[:8]}"
        answers = {node.id: folder / f"{probe.name}-{number}" for number, node in enumerate(asked)}
        try:
            probe.write_text(word, encoding="utf-8")
            found = self._ask(asked, {id: (str(probe), word, str(answer)) for id, answer in answers.items()})
            for node in asked:
                if (said := found.get(node.id)) is None:
                    continue
                refuse_other_software(mine, said["software"], node.name)
                wrong = said["wrong"] or ("" if _holds(answers[node.id], word) else "what it writes is not seen here")
                if wrong:
                    raise UserError(
                        f"node {node.name} does not share this folder with this machine: {wrong}",
                        remedy="give a folder on a file system that every node mounts under the same path (--folder)",
                        file=folder,
                        field="--on",
                    )
                self._known[node.id] = said["hardware"]
        finally:
            for file in (probe, *answers.values()):
                file.unlink(missing_ok=True)
        names = {node.id: node.name for node in self.nodes()}
        return say_other_hardware({f"{names.get(id, '?')} [{id[:6]}]": has for id, has in self._known.items()})

    def _ask(self, nodes: Sequence[Node], probes: dict[str, tuple[str, str, str]]) -> dict[str, Any]:
        source = Path(facts.__file__).read_text(encoding="utf-8")
        task = self.ray.remote(_asker())
        answers: dict[str, Any] = {}
        for node in nodes:
            there = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id=node.id, soft=False)
            options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}
            answers[node.id] = task.options(**options).remote(source, *probes[node.id])
        found = {}
        for node in nodes:
            try:
                found[node.id] = self.ray.get(answers[node.id], timeout=FACTS_SECONDS)
            except self.ray.exceptions.RayError as error:
                if self._is_gone(node):
                    continue
                raised = raised_there(self.ray, error) or error
                raise UserError(
                    f"node {node.name} of the Ray cluster did not answer: {first_line(raised)}",
                    remedy="look at its logs (/tmp/ray/session_latest/logs), or take it out of the cluster",
                    field="--on",
                ) from None
        return found

    def _is_gone(self, node: Node) -> bool:
        """Whether a node has just been lost; Ray takes a moment to know."""
        until = time.monotonic() + GONE_SECONDS
        while any(other.id == node.id for other in self.nodes()):
            if time.monotonic() > until:
                return False
            time.sleep(0.5)
        return True


def _asker() -> Callable[..., Any]:
    """A function that runs a program on a node. Ray sends it by its code, since it is no name of a module."""

    def ask(source: str, *arguments: str) -> Any:
        import json
        import subprocess
        import sys

        done = subprocess.run([sys.executable, "-c", source, *arguments], capture_output=True, text=True, timeout=170)
        if done.returncode:
            raise RuntimeError(f"its Python {sys.executable} failed: {done.stderr[-500:]}")
        return json.loads(done.stdout.splitlines()[-1])

    return ask


def _is_of_ray(error: BaseException | None) -> TypeGuard[BaseException]:
    """Whether Ray, or what it talks with, raised this."""
    modules = [kind.__module__.partition(".")[0] for kind in type(error).__mro__]
    return error is not None and any(module in ("ray", "grpc") for module in modules)


def _holds(file: Path, word: str) -> bool:
    return facts.sees(str(file), word, str(file)) == ""


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """Keep the handlers that Ray replaces by its own: the command says itself how it was ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hook = sys.excepthook
    try:
        yield
    finally:
        sys.excepthook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread after so long: something that is no Ray may listen at the address."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise TimeoutError(f"no answer within {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

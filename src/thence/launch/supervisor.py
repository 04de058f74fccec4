"""What runs on a node beside the process that it watches: it starts it, passes on what it says, and ends it.

Ray runs one of these as an actor for every process. The process itself is the one that would run without Ray, in the
same environment; it ends when this one does, for whatever reason.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thence.launch.process import PIECE, Worker
from thence.locks import is_held

FENCE_SECONDS = 90.0
"""How long a run's folder may still be held by a process on a node that is lost: Ray ends what runs there in less."""
ERROR_TAIL = 4000
"""Bytes of what a rank says last on standard error: its error is told there."""


class JobSupervisor:
    """Watches a process that runs one job after the other (:class:`thence.launch.process.Worker`).

    Args:
        module, folder, log, threads, environment: of that process.
    """

    def __init__(self, module: str, folder: str, log: str, threads: int, environment: Mapping[str, str]):
        self._open = lambda: Worker(module, Path(folder), Path(log), threads, environment=environment)
        self._worker: Worker | None = None

    def where(self) -> dict[str, str]:
        """The node that this runs on: Ray's id of it, and its name."""
        from thence.launch.package import ray_module

        return {"id": ray_module().get_runtime_context().get_node_id(), "host": socket.gethostname()}

    def start(self, tables: Mapping[str, Any], folder: str) -> None:
        """Begin a job, once no other process holds its folder any more."""
        until = time.monotonic() + FENCE_SECONDS
        while is_held(Path(folder)) and time.monotonic() < until:
            time.sleep(0.25)
        if self._worker is None:
            self._worker = self._open()
        self._worker.send(tables)

    def messages(self, seconds: float) -> list[dict[str, Any]]:
        """What the process has said since; waits for so long where there is nothing."""
        worker = self._worker
        assert worker is not None
        if not select.select([worker.output], [], [], seconds)[0]:
            return []
        said = worker.messages()
        if any("died" in message for message in said):
            worker.stop()
            self._worker = None
        return said


class RankSupervisor:
    """Watches the process of one rank."""

    def where(self) -> dict[str, Any]:
        """The node that this runs on (Ray's id of it, and its name), its address there, a free port, and its GPUs."""
        from thence.launch.package import ray_module

        ray = ray_module()
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        return {
            "id": ray.get_runtime_context().get_node_id(),
            "host": socket.gethostname(),
            "address": ray.util.get_node_ip_address(),
            "port": port,
            "gpus": [str(number) for number in ray.get_gpu_ids()],
        }

    def start(self, module: str, arguments: list[str], folder: str, environment: Mapping[str, str]) -> None:
        """Begin."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        self._streams: dict[Any, str] = {self._process.stdout: "out", self._process.stderr: "err"}
        self._tail = b""

    def messages(self, seconds: float) -> list[dict[str, Any]]:
        """What the process has printed since, or that it ended; waits for so long where there is nothing."""
        ready = select.select(list(self._streams), [], [], seconds)[0]
        said: list[dict[str, Any]] = []
        for pipe in ready:
            name, piece = self._streams[pipe], os.read(pipe.fileno(), PIECE)
            if not piece:
                del self._streams[pipe]
                continue
            if name == "err":
                self._tail = (self._tail + piece)[-ERROR_TAIL:]
            said.append({name: piece})
        if not self._streams:
            code, tail = self._process.wait(), self._tail.decode("utf-8", errors="replace")
            said.append({"ended": code, "tail": tail, "where": socket.gethostname()})
        return said

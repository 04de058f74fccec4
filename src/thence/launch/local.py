"""Processes on this machine."""

from __future__ import annotations

import selectors
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Self

from thence.launch.base import LAST, Message, Needs, Order
from thence.launch.process import Worker


class LocalLauncher:
    """So many processes side by side, each of which runs one job after the other. What a job needs is not looked at.

    Args:
        module: the program of a process (:mod:`thence.launch.process`).
        folder: their working directory; what they print is in ``logs/`` there.
        jobs: processes side by side.
        threads: of each.
        lock: a file descriptor that they hold too, so that none is still writing when another comparison starts.
    """

    def __init__(self, module: str, folder: Path, *, jobs: int, threads: int, lock: int):
        self.module, self.folder, self.jobs, self.threads, self.lock = module, folder, jobs, threads, lock
        self._workers: dict[int, Worker] = {}
        self._busy: dict[int, Hashable] = {}
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers.values():
            worker.stop()
        self._selector.close()

    def check(self, needs: Iterable[Needs]) -> None:
        """Nothing: a job that does not fit is told by the system."""

    def has_room(self, needs: Needs) -> bool:
        return len(self._busy) < self.jobs

    def start(self, order: Order) -> None:
        number = next(n for n in range(self.jobs) if n not in self._busy)
        if number not in self._workers:
            log = self.folder / "logs" / f"worker-{number}.log"
            self._workers[number] = Worker(self.module, self.folder, log, self.threads, keep_open=(self.lock,))
        self._busy[number] = order.key
        self._workers[number].send(order.tables)
        self._selector.register(self._workers[number].output, selectors.EVENT_READ, number)

    def events(self, seconds: float) -> Iterator[tuple[Hashable, Message]]:
        for key, _ in self._selector.select(timeout=seconds):
            number, worker = key.data, self._workers[key.data]
            job = self._busy[number]
            for message in worker.messages():
                if any(word in message for word in LAST):
                    self._selector.unregister(worker.output)
                    del self._busy[number]
                if "died" in message:
                    worker.stop()
                    del self._workers[number]  # the next job gets a new process
                yield job, message

"""Work beside the training: one piece at a time, in a thread of every rank, with a process group of its own.

The ranks begin it after the same step, and ask together whether it has ended: so what fails on one of them ends all
after the same step, with the same error.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from thence.train.parallel.ranks import Ranks


class Beside:
    """A thread on every rank. All ranks make one, and call its methods in the same order.

    Args:
        ranks: who trains.

    Attributes:
        ranks: the same ranks for the thread, which may wait for each other while training goes on.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks.apart()
        self._training = ranks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="thence-beside")
        self._running: Future[Any] | None = None

    def begin(self, act: Callable[[], object]) -> None:
        """Do this in the thread. What was begun before has ended by then; raises what failed in it."""
        self.wait()
        self._running = self._thread.submit(act)

    def look(self) -> None:
        """Raise what has failed on any rank, without waiting for what has not ended."""
        if self._running is None:  # on all ranks or on none
            return
        ended = self._running.done()
        failed = ended and self._running.exception() is not None
        all_ended, any_failed = self._training.sum_counts([ended, failed])
        if any_failed or all_ended == self._training.world:
            self.wait()

    def wait(self) -> None:
        """Return when what was begun has ended; raises what failed in it, once."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """End the thread, after what it is doing. What fails in it now is not raised: something else has."""
        with suppress(Exception):
            self.wait()
        self._thread.shutdown()

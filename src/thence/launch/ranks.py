"""The ranks of one run on several machines: one error for all, and another start where a machine is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from thence.errors import UserError
from thence.explain import LOST_EACH_OTHER

GRACE = 5.0
"""Seconds in which the other ranks may say, after one has failed, that they have failed too."""
SILENCE = 60.0
"""The same where all that is known is that ranks lost each other: the machine of the silent ones may be gone, and Ray
takes a while to find that out."""

RankMessage = Mapping[str, Any]
"""``{"out": bytes}`` and ``{"err": bytes}``: what a rank has printed; ``{"ended": code, "tail": text, "where": node}``;
``{"lost": why}``."""


class RankSet(Protocol):
    """The processes of one start of a run. All end with the block in which it is entered."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def events(self, seconds: float) -> Iterable[tuple[int, RankMessage]]:
        """What has been heard of each rank since; waits for so long where there is nothing."""
        ...


class Show(Protocol):
    """Is told what the reader of the command sees."""

    def printed(self, stream: str, text: bytes) -> None:
        """The first rank has printed this on ``out`` or ``err``."""
        ...

    def said(self, text: str) -> None:
        """Something about the ranks."""
        ...


@dataclass
class _Start:
    """What is known of one start."""

    ranks: int
    codes: dict[int, int] = field(default_factory=dict)
    tails: dict[int, str] = field(default_factory=dict)
    where: dict[int, str] = field(default_factory=dict)
    lost: str = ""

    def failed(self) -> list[int]:
        """The ranks that failed: the first rank tells of all; last come those that only lost another one."""
        found = [rank for rank, code in self.codes.items() if code]
        return sorted(found, key=lambda rank: (LOST_EACH_OTHER in self.tails[rank], rank))

    def patience(self) -> float:
        """Seconds to wait for more after the first failure."""
        failed = self.failed()
        only_lost = all(LOST_EACH_OTHER in self.tails[rank] for rank in failed)
        return SILENCE if failed and only_lost and len(self.codes) < self.ranks else GRACE


def run_ranks(begin: Callable[[bool], RankSet], ranks: int, restarts: int, show: Show) -> int:
    """Run ranks to their end, again where a machine is lost.

    Args:
        begin: starts all of them; is told whether it is another start.
        restarts: how often they may start again.

    Returns:
        The exit code of the run: that of the rank whose error it is.

    Raises:
        UserError: a machine was lost more often.
    """
    attempt = 0
    while True:
        with begin(attempt > 0) as those:
            start = _watched(those, _Start(ranks), show)
        if not start.lost:
            return _told(start, show)
        if attempt == restarts:
            break
        attempt += 1
        show.said(
            f"{start.lost}: all ranks start again from the last checkpoint, or anew where there is none yet (restart "
            f"{attempt} of {restarts})"
        )
    raise UserError(
        f"{start.lost}; the ranks were started again {restarts} times",
        remedy="run the same command again: it resumes from the last checkpoint; --restarts allows more",
        field="--restarts",
    )


def _watched(those: RankSet, start: _Start, show: Show) -> _Start:
    """Hear ranks until all have ended, one is lost, or one has failed and the others had their time to say so."""
    failed_at = None
    while len(start.codes) < start.ranks and not start.lost:
        for rank, message in those.events(1.0):
            if "lost" in message:
                start.lost = start.lost or message["lost"]
            elif "ended" in message:
                start.codes[rank], start.tails[rank] = message["ended"], message["tail"]
                start.where[rank] = message["where"]
            elif rank == 0:
                for stream in ("out", "err"):
                    if stream in message:
                        show.printed(stream, message[stream])
        if start.failed() and failed_at is None:
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > start.patience():
            break
    return start


def _told(start: _Start, show: Show) -> int:
    """The exit code of the run. What other ranks than the first said of their own errors is shown."""
    failed = start.failed()
    for rank in failed:
        code, where = start.codes[rank], f"rank {rank} on node {start.where[rank]}"
        if code < 0:
            show.said(f"{where} was ended by signal {-code}; the same command resumes from the last checkpoint")
        if rank != 0 and "thence: " in start.tails[rank] and LOST_EACH_OTHER not in start.tails[rank]:
            show.said(f"{where} said:\n{start.tails[rank].rstrip()}")
    code = start.codes[failed[0]] if failed else 0
    return 1 if code < 0 else code

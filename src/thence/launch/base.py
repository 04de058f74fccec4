"""What a comparison asks of whoever runs its jobs, and what it is told."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

Message = Mapping[str, Any]
"""What is said of a job. ``{"progress": [stage, done, total]}``, ``{"done": true}`` and ``{"failed": why}`` come from
the process that runs it. The launcher adds ``{"note": text}``, ``{"placed": text}`` (it runs from now on, and where),
``{"died": why}`` (its process ended without a last word) and ``{"lost": why}`` (its machine went away)."""
LAST = ("done", "failed", "died", "lost")
"""After one of these nothing more is said of a job."""


@dataclass(frozen=True)
class Needs:
    """What one process needs of its machine.

    Args:
        cores: CPU cores.
        gpus: GPUs; a fraction shares one.
        memory: bytes of host memory; None: not known, nothing is set aside.
    """

    cores: float = 1.0
    gpus: float = 0.0
    memory: int | None = None

    def cover(self, other: Needs) -> bool:
        """Whether a process that was given this is a place for one that needs the other."""
        return (self.cores, self.gpus) == (other.cores, other.gpus) and (self.memory or 0) >= (other.memory or 0)

    def __str__(self) -> str:
        parts = [_counted(self.cores, "core")]
        if self.gpus:
            parts.append(_counted(self.gpus, "GPU"))
        if self.memory is not None:
            parts.append(f"{self.memory / 1e9:.1f} GB of memory")
        return ", ".join(parts)


@dataclass(frozen=True)
class Order:
    """A job as a launcher sees it.

    Args:
        key: what its messages are told under.
        tables: sent to the process that runs it.
        folder: where it writes; no other process does so meanwhile.
        needs: of its machine.
    """

    key: Hashable
    tables: Mapping[str, Any]
    folder: Path
    needs: Needs


class Launcher(Protocol):
    """Runs jobs in processes, several side by side. Everything ends with the block in which it is entered."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def check(self, needs: Iterable[Needs]) -> None:
        """Try that jobs of such needs can run at all, before the first one. Raises UserError."""
        ...

    def has_room(self, needs: Needs) -> bool:
        """Whether another job of such needs should be started now. True where none is running."""
        ...

    def start(self, order: Order) -> None:
        """Begin a job."""
        ...

    def events(self, seconds: float) -> Iterable[tuple[Hashable, Message]]:
        """What has been said since, by the jobs' keys; waits for so long where there is nothing.

        Raises:
            UserError: no job can run any more.
        """
        ...


def _counted(number: float, noun: str) -> str:
    return f"{number:g} {noun}" + ("" if number == 1 else "s")

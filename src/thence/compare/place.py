"""Where the runs of a comparison go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from thence.compare.plan import Job
from thence.launch.base import Launcher, Needs
from thence.launch.local import LocalLauncher

MODULE = "thence.compare.worker"


@dataclass(frozen=True)
class Place:
    """Where runs go, and what each of them needs there.

    Args:
        launcher: makes the launcher of a comparison, from its folder and the lock on it.
        needs: of a job.
    """

    launcher: Callable[[Path, int], Launcher]
    needs: Callable[[Job], Needs]


def on_this_machine(jobs: int, threads: int) -> Place:
    """So many processes side by side, each with so many threads."""
    return Place(
        launcher=lambda folder, lock: LocalLauncher(MODULE, folder, jobs=jobs, threads=threads, lock=lock),
        needs=lambda job: Needs(cores=threads),
    )

"""Where the runs of a comparison go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from thence.compare.needs import Asked, needs_of
from thence.compare.plan import Job
from thence.launch.base import Launcher, Needs
from thence.launch.cluster import Cluster
from thence.launch.local import LocalLauncher
from thence.launch.on_ray import RayLauncher

MODULE = "thence.compare.worker"


@dataclass(frozen=True)
class Place:
    """Where runs go, and what each of them needs there.

    Args:
        launcher: makes the launcher of a comparison, from its folder and the lock on it.
        needs: of a job, in the comparison's folder.
    """

    launcher: Callable[[Path, int], Launcher]
    needs: Callable[[Job, Path], Needs]


def on_this_machine(jobs: int, threads: int) -> Place:
    """So many processes side by side, each with so many threads."""
    return Place(
        launcher=lambda folder, lock: LocalLauncher(MODULE, folder, jobs=jobs, threads=threads, lock=lock),
        needs=lambda *_: Needs(cores=threads),
    )


def on_cluster(cluster: Cluster, asked: Asked, *, threads: int, most: int | None, say: Callable[[str], None]) -> Place:
    """On the nodes of a Ray cluster.

    Args:
        asked: what each run needs.
        threads: of each run.
        most: runs side by side; None: as many as the nodes hold.
        say: is told what concerns no single run.
    """
    return Place(
        launcher=lambda folder, _: RayLauncher(cluster, MODULE, folder, threads=threads, most=most, say=say),
        needs=lambda job, folder: needs_of(job.tables, folder, asked),
    )

"""Whether the files that a comparison's finished runs read are still what they were, before others read them.

Every run keeps the digests of what it read (:mod:`thence.pipeline.ground`). A comparison that is resumed, or extended
by seeds and arms, would otherwise set runs on edited data beside runs on the data as they were.
"""

from __future__ import annotations

from pathlib import Path

from thence.compare.plan import Planner
from thence.errors import UserError
from thence.pipeline.ground import State, kept_states, said, state_of


def check_same_files(planner: Planner) -> None:
    """Compare every file that a finished run has read with the one of that name now.

    A file that is gone is left to the runs that need it. Runs whose folder is gone are not compared: the kept results
    hold no digests.

    Raises:
        UserError: a file has changed.
        DamagedFile: what a run kept of its files cannot be read.
    """
    read: dict[tuple[str, bool], list[tuple[str, State]]] = {}
    for run in planner.runs():
        job = planner.job_if_any(run)
        if job is None or not (planner.summary(run) if run.arm else planner.has_model(run)):
            continue
        for file, state, sampled in kept_states(planner.folder / job.folder):
            if not Path(file).is_relative_to(planner.folder):  # the comparison's own models are no files of the user
                read.setdefault((file, sampled), []).append((run.arm or f"pretraining of {run.base}", state))
    for (file, sampled), states in read.items():
        if not Path(file).is_file():
            continue
        now = state_of(Path(file), sampled=sampled)
        changed = [
            (who, then) for who, then in states if (then["digest"], then["bytes"]) != (now["digest"], now["bytes"])
        ]
        if changed:
            who, then = changed[0]
            raise UserError(
                f"the file has changed since finished runs of this comparison read it ({who}): then {said(then)}, "
                f"now {said(now)}",
                remedy="put the file back; or give another --folder, where all runs read the file as it is now",
                file=file,
            )

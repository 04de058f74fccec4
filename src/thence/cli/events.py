"""``--json`` and ``--quiet``: what a command tells a program instead of a person.

With ``--json`` every line of standard output is one JSON object with a field ``event``; numbers that are not finite
are null. Errors stay on standard error, and the exit code says how it ended.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from thence.errors import UserError
from thence.evaluate.progress import EvaluationProgress
from thence.files import to_json
from thence.redaction import redacted

if TYPE_CHECKING:
    from thence.compare.foreseen import ForeseenRuns
    from thence.compare.plan import Job, PlannedRun, Planner
    from thence.evaluate.backends import Generation, Refused
    from thence.pipeline.foreseen import Foreseen

Way = Literal["shown", "quiet", "json"]
"""Who a command speaks to: a person, nobody, or a program."""
EVERY = 1.0
"""Seconds between two events of progress, where each sample would be one."""


def way_of(quiet: bool, json_: bool) -> Way:
    """What the two flags ask for. Raises UserError where both are given."""
    if quiet and json_:
        raise UserError("--quiet and --json do not go together", remedy="give one of them", field="--quiet")
    return "quiet" if quiet else "json" if json_ else "shown"


def tell(event: str, **facts: Any) -> None:
    """Print one event."""
    print(redacted(to_json({"event": event, **facts})), flush=True)


class _Records(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tell("log", level=record.levelname.lower(), text=record.getMessage())


@contextmanager
def logging_as_events(level: int = logging.INFO) -> Iterator[None]:
    """Print what thence logs as events for the time being."""
    logger, handler = logging.getLogger("thence"), _Records()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class RunEvents:
    """Events of a run: begin, planned, doing, stage, step."""

    def begin(self, name: str, stages: Sequence[str]) -> None:
        tell("begin", run=name, stages=stages)

    def planned(self, foreseen: Foreseen) -> None:
        tell("planned", **asdict(foreseen))

    def doing(self, what: str) -> None:
        tell("doing", what=what)

    def stage(self, name: str, total: int, done: int) -> None:
        self.name = name
        tell("stage", stage=name, total=total, done=done)

    def step(self, facts: Mapping[str, Any]) -> None:
        tell("step", **{"stage": self.name, **facts})


class EvaluationEvents(EvaluationProgress):
    """Events of an evaluation: begin, task, progress (once a second at most), grading, graded."""

    def __init__(self) -> None:
        self.task, self.total, self.done, self.told = "", 0, 0, -EVERY

    def begin(self, missing: int) -> None:
        tell("begin", missing=missing)

    def sampling(self, task: str, total: int, done: int) -> None:
        self.task, self.total, self.done = task, total, done
        tell("task", task=task, total=total, done=done)

    def sampled(self, generation: Generation) -> None:
        self._advance()

    def refused(self, refused: Refused) -> None:
        self._advance()

    def grading(self, task: str, total: int) -> None:
        tell("grading", task=task, total=total)

    def graded(self, task: str) -> None:
        tell("graded", task=task)

    def _advance(self) -> None:
        self.done += 1
        if time.monotonic() - self.told >= EVERY or self.done == self.total:
            self.told = time.monotonic()
            tell("progress", task=self.task, done=self.done, total=self.total)


class ComparisonEvents:
    """Events of a comparison: planned, begin, started, progress, noted, finished, failed, spent."""

    def planned(self, foreseen: ForeseenRuns) -> None:
        totals = {name: foreseen.total(name) for name in ("rule_flops", "trained_tokens", "generated_tokens")}
        tell("planned", runs=len(foreseen.each), not_counted=foreseen.unknown, **totals)

    def spent(self, said: str) -> None:
        tell("spent", said=said)

    def begin(self, planner: Planner, runs: Collection[PlannedRun]) -> None:
        tell("begin", runs=len(runs), done=sum(planner.is_done(run) for run in runs))

    def started(self, job: Job) -> None:
        tell("started", **_of(job.run))

    def progress(self, job: Job, stage: str, done: int, total: int) -> None:
        tell("progress", **_of(job.run), stage=stage, done=done, total=total)

    def noted(self, job: Job, what: str) -> None:
        tell("noted", **_of(job.run), what=what)

    def finished(self, job: Job, seconds: float) -> None:
        tell("finished", **_of(job.run), seconds=seconds)

    def failed(self, run: PlannedRun, why: str) -> None:
        tell("failed", **_of(run), why=why)


class NoEvents:
    """A comparison that tells nobody anything."""

    def planned(self, foreseen: ForeseenRuns) -> None:
        pass

    def spent(self, said: str) -> None:
        pass

    def begin(self, planner: Planner, runs: Collection[PlannedRun]) -> None:
        pass

    def started(self, job: Job) -> None:
        pass

    def progress(self, job: Job, stage: str, done: int, total: int) -> None:
        pass

    def noted(self, job: Job, what: str) -> None:
        pass

    def finished(self, job: Job, seconds: float) -> None:
        pass

    def failed(self, run: PlannedRun, why: str) -> None:
        pass


def _of(run: PlannedRun) -> dict[str, Any]:
    return {"arm": run.arm, "base": run.base, "seed": run.seed}


def tell_done(folder: Path, report: Path | None, results: Any) -> None:
    """The last event."""
    tell("done", folder=str(folder), report=None if report is None else str(report), results=results)

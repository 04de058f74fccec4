"""Running a comparison over local processes, so that it can be killed at any moment and goes on where it was."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from thence.compare.collect import collect
from thence.compare.design import Registrar, registered
from thence.compare.folder import check_folder, mark
from thence.compare.foreseen import ForeseenRuns, foresee_runs, spent_line
from thence.compare.plan import Job, PlannedRun, Planner
from thence.compare.preflight import refuse_what_cannot_run
from thence.compare.recipe import ComparisonRecipe
from thence.compare.registration import Registration
from thence.compare.result import Comparison, Failure, write_results
from thence.errors import UserError
from thence.files import write_over
from thence.framed import Inbox, pack
from thence.locks import held
from thence.redaction import redacted, redacted_values
from thence.toml import to_toml

LOCK_SECONDS = 5.0  # for workers of a comparison that was killed, which are just ending
ATTEMPTS = 2  # of a job whose process died without a word
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
"""For glibc, others ignore it: the large tensors that come and go in every step keep their memory, which would else be
given back to the system and zeroed anew each time."""
LOG_TAIL = 2000  # characters of a dead process's log that are shown


class ComparisonWatcher(Protocol):
    """Is told how a comparison goes."""

    def planned(self, foreseen: ForeseenRuns) -> None:
        """What the runs that are to come are planned to cost; told before :meth:`begin`, where a plan could be made."""
        ...

    def spent(self, said: str) -> None:
        """At the end: what was planned for the runs that are done now, beside what they spent, in words."""
        ...

    def begin(self, planner: Planner, runs: Collection[PlannedRun]) -> None:
        """All runs that the comparison needs; those that are done can be asked of the planner."""
        ...

    def started(self, job: Job) -> None:
        """A process has begun with a run, and says more when it has opened the model."""
        ...

    def progress(self, job: Job, stage: str, done: int, total: int) -> None:
        """A run has come so far in a stage."""
        ...

    def finished(self, job: Job, seconds: float) -> None:
        """A run has ended well."""
        ...

    def failed(self, run: PlannedRun, why: str) -> None:
        """A run has not."""
        ...


def compare(
    recipe: ComparisonRecipe,
    *,
    jobs: int = 1,
    threads: int = 1,
    only: Collection[str] = (),
    seeds: Collection[int] = (),
    bases: Collection[str] = (),
    amend: str = "",
    watcher: ComparisonWatcher,
) -> Comparison:
    """Run what is missing of a comparison, write ``results.json`` into its folder, and return the results.

    Args:
        jobs: processes side by side.
        threads: threads of each.
        only, seeds, bases: run these alone; empty: all.
        amend: why the design is not the registered one; empty: it is, or none is registered.
        watcher: is told of progress.

    Raises:
        UserError: another process runs this comparison; or its design is not the registered one.
        DamagedFile: its results, or what a run measured, cannot be read; nothing is written.
    """
    folder = recipe.path().resolve()
    check_folder(folder)
    planner = Planner(recipe, folder, only, seeds, bases)
    failures: list[Failure] = []
    # workers hold the lock too, so that none is still writing when the next comparison starts
    with held(folder, "runs this comparison", wait=LOCK_SECONDS) as lock:
        registered(planner, amend)
        mark(folder)
        from thence.pipeline.prompts import RenderedPrompts  # which needs torch: reading a comparison does not

        prompts = RenderedPrompts()
        if ran := bool(left := planner.to_run()):
            refuse_what_cannot_run(planner, left, prompts)
        foreseen = foresee_runs(planner, left, prompts, min(jobs, len(left))) if ran else None
        if foreseen is not None:
            watcher.planned(foreseen)
        registrar = Registrar(planner, amend)
        kept = redacted_values(recipe.model_dump(mode="json", exclude_none=True))
        write_over(folder / "comparison.toml", to_toml(kept))
        try:
            for failure in _run_all(planner, registrar, jobs, threads, lock, watcher):
                failures.append(failure)
        finally:
            results = collect(planner, failures, ran)
            write_results(folder, results)
        if foreseen is not None and (said := spent_line(planner, foreseen)):
            watcher.spent(said)
    return results


def register(recipe: ComparisonRecipe, amend: str = "") -> Registration:
    """Try what a comparison names, and write its registration into its folder; nothing is run.

    Args:
        amend: why the design is not the one that is registered already; empty: it is, or none is.

    Raises:
        UserError: the file does not ask for a registration; the design is not the registered one; or what it names
            cannot work.
    """
    if not recipe.registered:
        raise UserError(
            "the comparison does not ask for a registration", remedy="write registered = true", field="registered"
        )
    folder = recipe.path().resolve()
    check_folder(folder)
    planner = Planner(recipe, folder)
    with held(folder, "runs this comparison", wait=LOCK_SECONDS):
        registered(planner, amend)
        mark(folder)
        if left := planner.to_run():
            refuse_what_cannot_run(planner, left)
        return Registrar(planner, amend).register()


def _run_all(
    planner: Planner, registrar: Registrar, jobs: int, threads: int, lock: int, watcher: ComparisonWatcher
) -> Iterator[Failure]:
    """Run every run that is not done. Yields those that failed."""
    runs = list(planner.runs())
    watcher.begin(planner, runs)
    waiting = planner.to_run()
    workers = [Worker(planner.folder, i, threads, lock) for i in range(min(jobs, len(waiting)))]
    attempts: dict[PlannedRun, int] = {}
    try:
        with selectors.DefaultSelector() as selector:
            while waiting or any(worker.job for worker in workers):
                for worker in workers:
                    if worker.job is None:
                        busy = [other.job.run for other in workers if other.job]
                        started = yield from _start_next(planner, registrar, busy, worker, waiting, watcher)
                        if started:
                            selector.register(worker.output, selectors.EVENT_READ, worker)
                if not any(worker.job for worker in workers):
                    break  # what is left waits for something that failed
                for key, _ in selector.select(timeout=1.0):
                    worker: Worker = key.data
                    job = worker.job
                    assert job is not None
                    end = _end_of_job(worker, job, watcher)
                    if end is None:
                        continue
                    selector.unregister(worker.output)
                    worker.job = None
                    if "done" in end:
                        watcher.finished(job, time.monotonic() - worker.since)
                        continue
                    if "died" in end:
                        worker.restart()
                        attempts[job.run] = attempts.get(job.run, 0) + 1
                        if attempts[job.run] < ATTEMPTS:
                            waiting.insert(0, job.run)
                            continue
                    why = end.get("failed") or end["died"]
                    watcher.failed(job.run, why)
                    yield Failure(job.run.arm, job.run.base, job.run.seed, why)
        for run in waiting:
            why = "a run that it builds on failed"
            watcher.failed(run, why)
            yield Failure(run.arm, run.base, run.seed, why)
    finally:
        for worker in workers:
            worker.stop()


def _end_of_job(worker: Worker, job: Job, watcher: ComparisonWatcher) -> Mapping[str, Any] | None:
    """Pass on what a worker says of its progress; returns its last word on the job, if that has come."""
    for message in worker.messages():
        if "progress" not in message:
            return message
        watcher.progress(job, *message["progress"])
    return None


def _start_next(
    planner: Planner,
    registrar: Registrar,
    busy: Collection[PlannedRun],
    worker: Worker,
    waiting: list[PlannedRun],
    watcher: ComparisonWatcher,
) -> Generator[Failure, None, bool]:
    """Give a worker the first run that can start. Returns whether there was one.

    A design is registered after its tuning, so that a grid may still be widened: until then no reported run starts
    while one of tuning is ``busy``.
    """
    is_tuned = not any((run.base, run.seed) not in registrar.blocks for run in busy)
    for run in list(waiting):
        if registrar.is_due and registrar.is_reported(run) and not is_tuned:
            continue
        try:
            job = planner.job(run)
        except UserError as error:
            waiting.remove(run)
            watcher.failed(run, str(error))
            yield Failure(run.arm, run.base, run.seed, str(error))
            continue
        if job is None or not planner.can_start(run):
            continue
        waiting.remove(run)
        if planner.is_done(run) and planner.has_model(
            run
        ):  # the same settings as a run that another planned run has finished
            continue
        registrar.before(run)
        worker.start(job)
        watcher.started(job)
        return True
    return False


@dataclass
class Worker:
    """A process that runs jobs, one at a time."""

    folder: Path
    number: int
    threads: int
    lock: int

    def __post_init__(self) -> None:
        self.job: Job | None = None
        self.since = 0.0
        self.log = self.folder / "logs" / f"worker-{self.number}.log"
        self.log.parent.mkdir(exist_ok=True)
        self._launch()

    def _launch(self) -> None:
        self.inbox = Inbox()
        environment = {**KEEP_MEMORY, **os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "thence.compare.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self.folder,
                env=environment,
                pass_fds=(self.lock,),
                start_new_session=True,  # Ctrl-C reaches the comparison, which ends its workers
            )

    @property
    def output(self) -> Any:
        """What the selector watches."""
        return self.process.stdout

    def start(self, job: Job) -> None:
        """Begin a job."""
        self.job, self.since = job, time.monotonic()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # where it has died, the end of its output says so
            self.process.stdin.write(pack(dict(job.tables)))
            self.process.stdin.flush()

    def messages(self) -> list[dict[str, Any]]:
        """The messages that have come; the last is ``{"died": why}`` where the process has ended."""
        piece = os.read(self.output.fileno(), 1 << 16)
        if piece:
            return self.inbox.feed(piece)
        code = self.process.wait()
        tail = self.log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:].strip()
        return [{"died": f"its process ended with code {code}; the end of {self.log}:\n{redacted(tail)}"}]

    def restart(self) -> None:
        """A new process in place of one that died."""
        self.stop()
        self._launch()

    def stop(self) -> None:
        """End the process; a run in the middle can be taken up again."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

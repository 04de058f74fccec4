"""Running a comparison over processes, so that it can be killed at any moment and goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from thence.compare.collect import collect
from thence.compare.design import Registrar, registered
from thence.compare.folder import check_folder, mark
from thence.compare.foreseen import ForeseenRuns, foresee_runs, refuse_spent, spent_line
from thence.compare.place import Place, on_this_machine
from thence.compare.plan import Job, PlannedRun, Planner
from thence.compare.preflight import refuse_what_cannot_run
from thence.compare.recipe import ComparisonRecipe
from thence.compare.registration import Registration
from thence.compare.result import Comparison, Failure, write_results
from thence.compare.same_files import check_same_files
from thence.errors import UserError
from thence.files import write_over
from thence.launch.base import LAST, Launcher, Message, Needs, Order
from thence.locks import held
from thence.pipeline.folder import RunFolder
from thence.redaction import redacted_values
from thence.toml import to_toml
from thence.train.checkpoint import checkpoints

LOCK_SECONDS = 5.0  # for workers of a comparison that was killed, which are just ending
ATTEMPTS = 2  # of a job whose process died without a word
LOSSES = 3  # machines that may be lost under a run before it counts as failed


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

    def noted(self, job: Job, what: str) -> None:
        """Something about a run that whoever waits for it wants to know: where it is, why it waits."""
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
    place: Place | None = None,
    only: Collection[str] = (),
    seeds: Collection[int] = (),
    bases: Collection[str] = (),
    amend: str = "",
    watcher: ComparisonWatcher,
) -> Comparison:
    """Run what is missing of a comparison, write ``results.json`` into its folder, and return the results.

    Args:
        jobs: processes side by side on this machine.
        threads: threads of each.
        place: where the runs go instead.
        only, seeds, bases: run these alone; empty: all.
        amend: why the design is not the registered one; empty: it is, or none is registered.
        watcher: is told of progress.

    Raises:
        UserError: another process runs this comparison; its design is not the registered one; a file that finished
            runs read has changed; or no run can run there.
        DamagedFile: its results, or what a run measured, cannot be read; nothing is written.
    """
    folder = recipe.path().resolve()
    check_folder(folder)
    planner = Planner(recipe, folder, only, seeds, bases)
    place = place or on_this_machine(jobs, threads)
    failures: list[Failure] = []
    # workers hold the lock too, so that none is still writing when the next comparison starts
    with held(folder, "runs this comparison", wait=LOCK_SECONDS) as lock:
        registered(planner, amend)
        mark(folder)
        from thence.pipeline.prompts import RenderedPrompts  # which needs torch: reading a comparison does not

        prompts = RenderedPrompts()
        if ran := bool(left := planner.to_run()):
            check_same_files(planner)
            refuse_what_cannot_run(planner, left, prompts)
        foreseen = foresee_runs(planner, left, prompts, min(jobs, len(left))) if ran else None
        if foreseen is not None:
            refuse_spent(planner, foreseen)
            watcher.planned(foreseen)
        registrar = Registrar(planner, amend)
        kept = redacted_values(recipe.model_dump(mode="json", exclude_none=True))
        write_over(folder / "comparison.toml", to_toml(kept))
        try:
            with place.launcher(folder, lock) as launcher:
                for failure in _Going(planner, registrar, place, launcher, watcher).run_all():
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


@dataclass
class _Going:
    """A comparison that is being run."""

    planner: Planner
    registrar: Registrar
    place: Place
    launcher: Launcher
    watcher: ComparisonWatcher
    running: dict[PlannedRun, tuple[Job, float]] = field(default_factory=dict)
    """What runs, and since when."""
    full_for: Needs | None = None
    """Of the run that is next, where there was no room for it."""
    deaths: dict[PlannedRun, int] = field(default_factory=dict)
    losses: dict[PlannedRun, int] = field(default_factory=dict)

    def run_all(self) -> Iterator[Failure]:
        """Run every run that is not done. Yields those that failed."""
        self.watcher.begin(self.planner, list(self.planner.runs()))
        self.waiting = self.planner.to_run()
        known = [job for run in self.waiting if (job := self.planner.job_if_any(run)) is not None]
        self.launcher.check([self.place.needs(job, self.planner.folder) for job in known])
        to_look = True  # whether something has changed about what can start
        while self.waiting or self.running:
            while to_look or (self.full_for is not None and self.launcher.has_room(self.full_for)):
                to_look = yield from self._start_next()
            if not self.running:
                break  # what is left waits for something that failed
            for run, message in self.launcher.events(1.0):
                assert isinstance(run, PlannedRun)
                yield from self._heard(run, message)
                to_look |= any(word in message for word in LAST)
        for run in self.waiting:
            yield self._failure(run, "a run that it builds on failed")

    def _start_next(self) -> Generator[Failure, None, bool]:
        """Start the first run that can start. Returns whether there was one.

        A design is registered after its tuning, so that a grid may still be widened: until then no reported run starts
        while one of tuning is under way.
        """
        registrar = self.registrar
        self.full_for = None
        is_tuned = all((run.base, run.seed) in registrar.blocks for run in self.running)
        for run in list(self.waiting):
            if registrar.is_due and registrar.is_reported(run) and not is_tuned:
                continue
            try:
                job = self.planner.job(run)
            except UserError as error:
                self.waiting.remove(run)
                yield self._failure(run, str(error))
                continue
            if job is None or not self.planner.can_start(run):
                continue
            if self.planner.is_done(run) and self.planner.has_model(run):
                self.waiting.remove(run)  # the same settings as a run that another planned run has finished
                continue
            needs = self.place.needs(job, self.planner.folder)
            if not self.launcher.has_room(needs):
                self.full_for = needs  # a later run with smaller needs does not pass it by
                return False
            self.waiting.remove(run)
            registrar.before(run)
            self.running[run] = job, time.monotonic()
            self.launcher.start(Order(run, job.tables, self.planner.folder / job.folder, needs))
            self.watcher.started(job)
            return True
        return False

    def _heard(self, run: PlannedRun, message: Message) -> Iterator[Failure]:
        """Act on what is said of a run."""
        job, since = self.running[run]
        if "progress" in message:
            self.watcher.progress(job, *message["progress"])
            return
        if "note" in message or "placed" in message:
            if "placed" in message:
                self.running[run] = job, time.monotonic()
            self.watcher.noted(job, message.get("note") or message["placed"])
            return
        del self.running[run]
        if "done" in message or ("lost" in message and self.planner.summary(run) is not None):
            self.watcher.finished(job, time.monotonic() - since)
            return
        why = str(message.get("failed") or message.get("died") or message["lost"])
        if "died" in message:
            self.deaths[run] = self.deaths.get(run, 0) + 1
            if self.deaths[run] < ATTEMPTS:
                self.waiting.insert(0, run)
                return
        if "lost" in message:
            self.losses[run] = self.losses.get(run, 0) + 1
            if self.losses[run] <= LOSSES:
                self.watcher.noted(job, f"{why}: {self._from_where(job)}")
                self.waiting.insert(0, run)
                return
            why = f"{why}; this was loss {self.losses[run]} of this run, and it is given up"
        yield self._failure(run, why)

    def _from_where(self, job: Job) -> str:
        """How a run goes on whose machine is gone."""
        folder = RunFolder(self.planner.folder / job.folder)
        done = [name for name in job.tables["stages"] if folder.is_done(name)]
        for name in job.tables["stages"]:
            if name not in done and (found := checkpoints(folder.stage(name) / "checkpoints")):
                return f"resumes from its last checkpoint ({name}, {found[-1].name})"
        return f"resumes after stage {done[-1]}, which is done" if done else "starts anew, it has no checkpoint yet"

    def _failure(self, run: PlannedRun, why: str) -> Failure:
        self.watcher.failed(run, why)
        return Failure(run.arm, run.base, run.seed, why)

"""A pool of guarded processes that check answers: no response can hang or crash a run.

Every answer has a wall-clock limit, kept by killing its process, and a memory limit, kept by the kernel. A killed or
broken process costs its own answer an UNKNOWN verdict and is replaced; the others go on. The processes start afresh
(no fork of a process that holds torch) and end with their parent, whatever way it ends. POSIX systems only; the memory
limit needs Linux. The pool protects a run from accidents and from answers that are hard to check. It is not a sandbox
for code.
"""

from __future__ import annotations

import os
import selectors
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from thence.errors import UserError
from thence.machine import usable_cores
from thence.verify.boxed import BOX
from thence.verify.math import Rule, grade_by_text, graded_part, unboxed_part, without_reward
from thence.verify.process import WorkerProcess
from thence.verify.verdict import Grade, from_plain, unknown, wrong

MAX_CHARS = 200_000
MAX_WORKERS = 8
MAX_FAILED_STARTS = 3
MIN_MEMORY_MB = 192


@dataclass(frozen=True)
class GradeRequest:
    """A response to grade against a gold answer by a rule of `thence.verify.math.graded_part`."""

    response: str
    answer: str | None
    rule: Rule = "plain"


class GradingPool:
    """Worker processes that grade mathematical answers; a context manager.

    Args:
        workers: processes; None takes one for each CPU that this process may use, at most 8. They start when first
            needed.
        seconds: wall-clock limit of one answer.
        memory_mb: limit of a worker's address space in MiB, libraries (about 64 MiB) included.

    Raises:
        UserError: a limit that makes no sense.
    """

    def __init__(self, workers: int | None = None, seconds: float = 10.0, memory_mb: int = 1024):
        if workers is not None and workers < 1:
            raise UserError(f"{workers} grading workers", remedy="ask for at least one", field="workers")
        if not seconds > 0:
            raise UserError(f"a time limit of {seconds} s", remedy="set a positive number of seconds", field="seconds")
        if memory_mb < MIN_MEMORY_MB:
            remedy = f"set at least {MIN_MEMORY_MB}: the checker itself takes about 64"
            raise UserError(f"a memory limit of {memory_mb} MiB is too small", remedy=remedy, field="memory_mb")
        self.seconds, self.memory_mb = seconds, memory_mb
        self._size = workers or min(usable_cores(), MAX_WORKERS)
        self._workers: list[WorkerProcess] = []
        self._failed_starts = 0
        self._lock = threading.Lock()
        # Also runs at the end of the interpreter. Idle workers end by themselves then; this spares the busy ones' time.
        self._finalizer = weakref.finalize(self, _kill_all, self._workers, os.getpid())

    def __enter__(self) -> GradingPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers. The pool cannot be used again."""
        self._finalizer()

    @property
    def pids(self) -> list[int]:
        """Process numbers of the present workers."""
        return [worker.pid for worker in self._workers]

    def grade_many(self, items: Sequence[GradeRequest]) -> list[Grade]:
        """Grade in parallel; the grades come in the order of the items.

        A graded part of more than 200,000 characters loses its beginning, since the final answer stands last; the
        grade's reason says so.

        Raises:
            UserError: the workers do not start.
            ValueError: the pool is closed.
        """
        with self._lock:
            if not self._finalizer.alive:
                raise ValueError("the grading pool is closed")
            job = _Job(items)
            try:
                while job.unfinished:
                    self._staff(len(job.waiting))
                    for worker in self._workers:
                        if worker.idle and job.waiting:
                            index = job.waiting.popleft()
                            worker.begin(index, *job.texts[index])
                    self._exchange(job)
            except BaseException:
                self._abandon()
                raise
            return job.result()

    def _staff(self, waiting: int) -> None:
        """Replace idle workers that have ended, and start more while there is work for them."""
        for worker in [w for w in self._workers if w.idle and w.dead()]:
            self._dismiss(worker)
        busy = sum(worker.task is not None for worker in self._workers)
        while len(self._workers) < min(self._size, busy + waiting):
            self._workers.append(WorkerProcess(self.seconds, self.memory_mb))

    def _exchange(self, job: _Job) -> None:
        """Wait until a worker can be written to or has something to say, or a deadline passes; act on it."""
        awaited = [worker for worker in self._workers if not worker.idle]
        with selectors.DefaultSelector() as selector:
            for worker in awaited:
                selector.register(worker.output, selectors.EVENT_READ, worker)
                if worker.sending:
                    selector.register(worker.input, selectors.EVENT_WRITE, worker)
            left = min(worker.deadline for worker in awaited) - time.monotonic()
            events = selector.select(max(left, 0.0))
        for key, mask in events:
            worker: WorkerProcess = key.data
            if worker not in self._workers:  # lost to an event just before this one
                continue
            if mask & selectors.EVENT_WRITE:
                worker.write()
            else:
                self._listen(worker, job)
        now = time.monotonic()
        for worker in awaited:
            if worker in self._workers and not worker.idle and now >= worker.deadline:
                self._lose(worker, job, "time limit")

    def _listen(self, worker: WorkerProcess, job: _Job) -> None:
        try:
            messages = worker.receive()
        except EOFError:
            # SIGALRM is the worker's own time limit, which comes first only when this process was held up.
            ending = worker.ending()
            self._lose(worker, job, "time limit" if ending == "SIGALRM" else f"grading process ended ({ending})")
            return
        for message in messages:
            if "failed" in message:
                raise _start_error(message["failed"], self.memory_mb)
            if "ready" in message:
                worker.ready, self._failed_starts = True, 0
                continue
            self._finish(worker, job, message)

    def _finish(self, worker: WorkerProcess, job: _Job, message: dict[str, Any]) -> None:
        assert worker.task is not None
        job.grades[worker.task] = from_plain(message["grade"])
        worker.task = None
        if message["retire"]:
            self._dismiss(worker)

    def _lose(self, worker: WorkerProcess, job: _Job, reason: str) -> None:
        """A worker broke or ran out of time; what it was working on gets no verdict."""
        if worker.task is not None:
            job.grades[worker.task] = unknown(reason)
        elif not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise _start_error(reason, self.memory_mb)
        self._dismiss(worker)

    def _dismiss(self, worker: WorkerProcess) -> None:
        worker.kill()
        self._workers.remove(worker)

    def _abandon(self) -> None:
        """After an interruption: whoever is at work would answer a question that nobody asks any more."""
        for worker in [w for w in self._workers if not w.idle]:
            self._dismiss(worker)


class _Job:
    """One call of `grade_many`: what is still to be graded and the grades so far."""

    def __init__(self, items: Sequence[GradeRequest]):
        self.grades: list[Grade | None] = [None] * len(items)
        self.texts: dict[int, tuple[str, str]] = {}
        self.cut: set[int] = set()
        self.unboxed: set[int] = set()
        for index, item in enumerate(items):
            part = graded_part(item.response, item.rule)
            if item.answer is None:
                self.grades[index] = unknown("no gold answer")
            elif part is None and (part := unboxed_part(item.response, item.rule)) is None:
                self.grades[index] = wrong(None, "no answer given")
            elif by_text := grade_by_text(item.response, part, item.answer, item.rule):
                self.grades[index] = by_text
            else:
                if item.rule == "boxed" and BOX not in part:
                    self.unboxed.add(index)
                self.texts[index] = part[-MAX_CHARS:], item.answer
                if len(part) > MAX_CHARS:
                    self.cut.add(index)
        self.waiting = deque(self.texts)

    @property
    def unfinished(self) -> bool:
        return any(grade is None for grade in self.grades)

    def result(self) -> list[Grade]:
        return [self._noted(index, grade) for index, grade in enumerate(self.grades) if grade is not None]

    def _noted(self, index: int, grade: Grade) -> Grade:
        if index in self.unboxed:
            grade = without_reward(grade)
        if index not in self.cut:
            return grade
        note = f"only the last {MAX_CHARS} characters were graded"
        return replace(grade, reason=f"{grade.reason}; {note}" if grade.reason else note)


def _start_error(reason: str, memory_mb: int) -> UserError:
    return UserError(
        f"the processes that check answers do not start: {reason}",
        remedy="check that `python -c 'import math_verify'` works in this environment, and that memory_mb "
        f"({memory_mb}) leaves room for it",
    )


def _kill_all(workers: list[WorkerProcess], owner: int) -> None:
    # A process forked from the owner inherits this object but not the right to end the owner's workers.
    if os.getpid() == owner:
        for worker in workers:
            worker.kill()
        workers.clear()

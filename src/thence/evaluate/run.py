"""Running an evaluation: what is missing in the store is sampled, then what has no grade is graded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from thence.data.order import stable_seed
from thence.errors import UserError
from thence.evaluate.backends import Backend, Refused, Request
from thence.evaluate.choices import grade_letter
from thence.evaluate.problems import Problem, columns_digest
from thence.evaluate.progress import EvaluationProgress
from thence.evaluate.refusals import ENOUGH, Refusal, nothing_answered
from thence.evaluate.store import GradeLine, Sample, Settings, Store
from thence.evaluate.suites import Task
from thence.evaluate.versions import LETTER, grader_version, with_threshold
from thence.verify.grader import Grader
from thence.verify.own_function import Stated
from thence.verify.reward import load_reward
from thence.verify.verdict import Grade

log = logging.getLogger(__name__)
GRADED_AT_ONCE = 256
NAMED = 3  # refusals of a task that are logged one by one


SeedOf = Callable[[Task, Problem, int], int]
"""The seed of a problem's response of this number, from 0."""


def own_seed(task: Task, problem: Problem, number: int) -> int:
    """The seed of a response where nothing else is asked for: it follows from the task's seed and the problem."""
    return stable_seed(task.seed, task.name, problem.key, number)


def evaluate(
    settings: Settings,
    problems: Mapping[str, Sequence[Problem]],
    folder: Path,
    make_backend: Callable[[], Backend],
    *,
    environment: Callable[[], Mapping[str, Any]] = dict,
    progress: EvaluationProgress | None = None,
    seed_of: SeedOf = own_seed,
    checker: Grader | None = None,
) -> Store:
    """Run an evaluation, or resume it where it was.

    Args:
        settings: what to do; the folder refuses others than those it was begun with.
        problems: of every task of the settings, by its name.
        folder: where everything is kept.
        make_backend: opens what generates; called only if a sample is missing.
        environment: facts to keep beside the backend's own. Where nothing is missing, and so nothing is opened, they
            are held against those that were kept.
        progress: is told of progress; nobody when absent.
        seed_of: the seeds of the responses.
        checker: grades all tasks, and stays open; default: the one that each task names is opened.

    Returns:
        The store, with every sample and its grade, and with what could not be asked and why; that is asked again when
        the evaluation is run again.

    Raises:
        UserError: other settings, problems or weights than in the folder; a backend or grader that gives up; not one
            request is answered. What was sampled and graded before stands.
    """
    store, progress = Store(folder), progress or EvaluationProgress()
    store.check(settings)  # before anything is written, the lock included
    with store.held():
        missing = {name: _missing(store, task, problems[name], seed_of) for name, task in settings.tasks.items()}
        # opened first: a model or server that is refused leaves no folder that then holds other settings
        backend = make_backend() if any(missing.values()) else None
        try:
            facts = {} if backend is None else backend.facts()
            store.check_unchanged({**environment(), **facts})  # before anything is written: a refusal changes nothing
            store.begin(settings)
            store.write_problems({name: [problem.key for problem in problems[name]] for name in settings.tasks})
            progress.begin(sum(map(len, missing.values())))
            refusing = _Refusing(store, any(store.samples(name) for name in settings.tasks))
            with _recorded(store, backend, environment):
                for name, task in settings.tasks.items():
                    if backend is not None:
                        total = len(problems[name]) * task.samples
                        _sample(store, task, backend, missing[name], total, progress, refusing)
                    columns = {problem.key: problem.columns for problem in problems[name]}
                    grade(store, task, task.grader, progress=progress, checker=checker, columns=columns)
                    progress.graded(name)
                refusing.end()
        finally:
            if backend is not None:
                backend.close()
    return store


@contextmanager
def _recorded(store: Store, backend: Backend | None, environment: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Keep what the samples of this start depend on; a server shows only when asked what it does not take."""
    if backend is None:
        yield
        return
    facts = backend.facts()
    store.record_start({**environment(), **facts})
    try:
        yield
    finally:
        found = backend.facts()
        if found != facts:
            store.amend_start({key: value for key, value in found.items() if facts.get(key) != value})


def regrade(folder: Path, grader: str | None = None, progress: EvaluationProgress | None = None) -> Store:
    """Grade the samples of a folder again, without generating; the new grades stand beside the old ones.

    Args:
        grader: a name as in a recipe's `reward`; None: each task's own grader, in the version installed here.

    Raises:
        UserError: no evaluation there, or no such grader.
    """
    store = Store(folder)
    tasks = store.settings().tasks
    store.environment()  # what cannot be read is said before anything is written
    store.problems()
    with store.held():
        played = [name for name, task in tasks.items() if grader in (None, task.grader) and _was_played(store, task)]
        if len(played) == len(tasks):
            raise UserError(
                f"the environment {tasks[played[0]].grader} scored these responses while they were sampled, and cannot "
                "again",
                remedy="evaluate again into another folder, or name a grader of texts: --grader exact",
                file=store.folder,
            )
        for name, task in tasks.items():
            if name in played:
                log.warning("%s: its environment scored it while it was sampled, and these scores stay", name)
            else:
                grade(store, task, grader or task.grader, again=True, progress=progress)
    return store


def _was_played(store: Store, task: Task) -> bool:
    return any(sample.score is not None for sample in store.samples(task.name))


def grade(
    store: Store,
    task: Task,
    grader: str,
    *,
    again: bool = False,
    progress: EvaluationProgress | None = None,
    checker: Grader | None = None,
    columns: Mapping[str, str | None] | None = None,
) -> None:
    """Grade the samples of a task that have no grade of this grader in its present version; all of them `again`.

    Of multiple choice, the lenient letter rule is kept beside it, as the grader `letter`.

    Args:
        checker: the grader, which stays open; default: the one of this name is opened.
        columns: what else the row of a problem holds, by its key, a JSON object as text.
    """
    samples = store.samples(task.name)
    if grader == task.grader and any(sample.score is not None for sample in samples):
        _take_scores(store, task, samples)
        return
    version = grader_version(grader, task.right_from if grader == task.grader else None)
    have = set() if again else set(store.graded(task.name, grader, version))
    todo = [sample for sample in samples if sample.place not in have]
    if todo:
        (progress or EvaluationProgress()).grading(task.name, len(todo))
        with ExitStack() as opened:
            if checker is None:
                limits = {"seconds": task.grader_seconds, "setting": "grader_seconds"}
                named = load_reward(grader, right_from=task.right_from if grader == task.grader else None, **limits)
                checker = opened.enter_context(named)
            lines = opened.enter_context(store.write_grades(task.name))
            for start in range(0, len(todo), GRADED_AT_ONCE):
                part = todo[start : start + GRADED_AT_ONCE]
                others = [(columns or {}).get(sample.problem) for sample in part]
                known = None if None in others else [str(text) for text in others]
                asked, texts, answers = zip(*((s.question, s.said, s.answer) for s in part), strict=True)
                for sample, one in zip(part, checker.grade_many(asked, texts, answers, known), strict=True):
                    lines.add(_line(sample, grader, version, one))
    if task.choices:
        version = grader_version(LETTER)
        have = set() if again else set(store.graded(task.name, LETTER, version))
        with store.write_grades(task.name) as lines:
            for sample in samples:
                if sample.place not in have:
                    lines.add(_line(sample, LETTER, version, grade_letter(sample.as_problem(task.name), sample.text)))


def _take_scores(store: Store, task: Task, samples: Sequence[Sample]) -> None:
    """Keep the scores that an environment gave while it was sampled, as grades of the version that gave them."""
    known, right_from = store.graded(task.name, task.grader), task.right_from
    with store.write_grades(task.name) as lines:
        for sample in samples:
            if (given := sample.score) is None:
                continue
            version = with_threshold(given.version or grader_version(task.grader), right_from)
            if sample.place in known and known[sample.place].version == version:
                continue
            verdict = given.verdict
            if right_from is not None and verdict != "unknown":
                verdict = Stated(True, right_from).verdict(given.score).value
            found = (verdict, given.score, None, given.reason)
            lines.add(GradeLine(sample.problem, sample.sample, task.grader, version, *found))


def _line(sample: Sample, grader: str, version: str, found: Grade) -> GradeLine:
    return GradeLine(
        *(sample.problem, sample.sample, grader, version),
        *(found.verdict.value, found.score, found.extracted, found.reason),
        dict(found.components) or None,
    )


def _missing(store: Store, task: Task, problems: Sequence[Problem], seed_of: SeedOf) -> list[Request]:
    """The samples that are not in the store yet, problem by problem.

    Raises:
        UserError: the store holds samples of other problems, or of the same with other prompts or answers.
    """
    by_key = {problem.key: problem for problem in problems}
    have, refused = set(), store.refusals(task.name)
    now = grader_version(task.environment.path) if task.environment is not None else ""
    for sample in store.samples(task.name):
        problem = by_key.get(sample.problem)
        if problem is None or not sample.answers(problem):
            raise UserError(
                f"the data of {task.name} have changed since the samples here were made: problem {sample.problem} "
                + ("is not there any more" if problem is None else "has another prompt, answer or other columns"),
                remedy="give another --folder, or the same data",
                file=store.folder,
            )
        if sample.score is not None and sample.score.version and now and sample.score.version != now:
            raise UserError(
                f"the environment {task.grader} has changed since it scored the samples here ({sample.score.version}, "
                f"now {now})",
                remedy="give another --folder, or put the file back as it was",
                file=store.folder,
            )
        have.add(sample.place)
    return [
        Request(
            *(problem, number, seed_of(task, problem, number)),
            refused_before=(problem.key, number) in refused,
        )
        for problem in problems
        for number in range(task.samples)
        if (problem.key, number) not in have
    ]


class _Refusing:
    """Keeps refusals, and stops an evaluation of which nothing is answered.

    `answered`: whether there are samples of an earlier start.
    """

    def __init__(self, store: Store, answered: bool):
        self.store, self.before, self.now = store, answered, False
        self.reasons: list[tuple[str, str]] = []
        self.problems: set[str] = set()
        self.named: dict[str, int] = {}

    def add(self, task: str, request: Request, refused: Refused) -> None:
        """Keep one. Raises UserError when enough problems were refused and nothing is answered."""
        problem, now = request.problem, datetime.now(UTC).isoformat(timespec="seconds")
        line = Refusal(problem.key, request.sample, problem.text, refused.kind, refused.reason, now)
        with self.store.write_refusals(task) as lines:
            lines.add(line)
        self.reasons.append((refused.kind, refused.reason))
        if not (self.before and request.refused_before):  # that the same are refused again is no news
            self.problems.add(problem.key)
        self.named[task] = self.named.get(task, 0) + 1
        if self.named[task] <= NAMED:
            log.warning("%s: problem %s is not answered (%s): %s", task, problem.key, refused.kind, refused.reason)
        if not self.now and len(self.problems) >= ENOUGH:
            raise nothing_answered(self.reasons, self.store.folder)

    def end(self) -> None:
        """Raises UserError when requests were refused and there is no sample at all."""
        if self.reasons and not (self.now or self.before):
            raise nothing_answered(self.reasons, self.store.folder)


def _sample(
    store: Store,
    task: Task,
    backend: Backend,
    requests: Sequence[Request],
    total: int,
    progress: EvaluationProgress,
    refusing: _Refusing,
) -> None:
    progress.sampling(task.name, total, total - len(requests))
    if not requests:
        return
    with store.write_samples(task.name) as lines:
        for request, generation in backend.generate(requests, task):
            problem = request.problem
            if isinstance(generation, Refused):
                refusing.add(task.name, request, generation)
                progress.refused(generation)
                continue
            refusing.now = True
            lines.add(
                Sample(
                    problem=problem.key,
                    sample=request.sample,
                    seed=request.seed,
                    prompt=problem.messages,
                    question=problem.text,
                    answer=problem.answer,
                    text=generation.text,
                    tokens=generation.tokens,
                    finish=generation.finish,
                    room=generation.room,
                    score=generation.score,
                    turns=generation.turns,
                    options=problem.options,
                    plain=problem.plain,
                    source=problem.source,
                    columns=columns_digest(problem),
                )
            )
            progress.sampled(generation)

"""The numbers of an evaluation, computed from its store: a row a task, a mean a group, and paired differences."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from thence.errors import UserError
from thence.evaluate.metrics import avg_at_k, maj_at_k, mean_reward_of, pass_at_k
from thence.evaluate.store import GradeLine, Sample, Settings, Store
from thence.evaluate.suites import Task
from thence.evaluate.versions import LETTER
from thence.files import to_json
from thence.stats.paired import Paired, paired
from thence.stats.proportion import joined, mean_score
from thence.stats.spread import Score

CUT = ("length", "context")
"""How responses end that a limit of tokens, or the model's context, has cut."""


@dataclass(frozen=True)
class TaskResult:
    """One task's numbers.

    Attributes:
        task: its settings.
        grader, versions: what graded, and in which versions.
        expected: problems that the task has (under the evaluation's limit).
        missing: samples that are not there yet or have no grade. Only problems with all samples are counted.
        not_answered: why a problem is not counted because requests for it got no response, by its key.
        not_answered_kinds: how many of them, by kind of refusal.
        avg: avg@k, k = samples a problem; None where no problem is complete.
        passed: k to pass@k, for k = 1, 2, 4, ... and all samples.
        majority: maj@k over all samples; None where your own function or environment names no answers to vote on.
        lenient: avg@k where any way to name the right letter counts; None where the task has no letters.
        right, wrong, unknown: verdicts over all samples counted. Unknown is counted as not right.
        never, always: problems counted of whose samples none or all are right. RL that compares the responses to a
            prompt (GRPO) has nothing to compare in them. Both 0 where there are degrees.
        graded: scores that are a degree without a threshold. Where there are any, nothing that needs right and wrong
            is defined: `avg`, `passed` and `majority` are empty, and `reward` takes their place.
        reward: `mean_reward`; None where right and wrong are known.
        mean_reward: mean score of the samples that have one; None where no sample has.
        truncated: responses cut by the limit of tokens or by the context.
        short: responses for which the context left less than `max_tokens`.
        mean_tokens: mean length of a response; None where the server did not tell.
        shares: share of right samples of each problem counted, by its key.
        prompts: a digest of the prompts of the problems counted.
        other_ends: responses counted that ended neither by themselves nor by a limit, by what the server called it;
            of environments also by the limit of turns, a time-out or an error.
    """

    task: Task
    grader: str
    versions: tuple[str, ...]
    expected: int
    missing: int
    avg: Score | None
    passed: dict[int, Score]
    majority: Score | None
    lenient: Score | None
    right: int
    wrong: int
    unknown: int
    truncated: int
    short: int
    mean_tokens: float | None
    shares: dict[str, float]
    prompts: str
    not_answered: dict[str, str] = field(default_factory=dict)
    not_answered_kinds: dict[str, int] = field(default_factory=dict)
    other_ends: dict[str, int] = field(default_factory=dict)
    graded: int = 0
    never: int = 0
    always: int = 0
    reward: Score | None = None
    mean_reward: Score | None = None


@dataclass(frozen=True)
class GroupResult:
    """The unweighted mean of avg@k over the tasks of a group (ID, OOD)."""

    name: str
    tasks: tuple[str, ...]
    score: Score


@dataclass(frozen=True)
class Result:
    """An evaluation's numbers.

    Attributes:
        settings, environment: what was done, and where.
        tasks: in the order of the suite.
        groups: means over the groups of more than one complete task.
    """

    settings: Settings
    environment: dict[str, Any]
    tasks: tuple[TaskResult, ...]
    groups: tuple[GroupResult, ...]

    @property
    def missing(self) -> int:
        """Samples that are not there yet or have no grade."""
        return sum(row.missing for row in self.tasks)

    @property
    def not_answered(self) -> int:
        """Problems left out because requests for them got no response."""
        return sum(len(row.not_answered) for row in self.tasks)


def summarise(store: Store, grader: str | None = None) -> Result:
    """The numbers of an evaluation as it stands, finished or not.

    Args:
        grader: whose grades count; None: each task's own.

    Raises:
        UserError: no evaluation there; no grade by this grader.
        DataError: a damaged line in the store.
    """
    settings = store.settings()
    keys = store.problems()
    rows = tuple(
        task_result(store, task, grader or task.grader, keys.get(name)) for name, task in settings.tasks.items()
    )
    if grader is not None and not any(row.versions for row in rows):
        raise UserError(
            f"nothing here is graded by {grader}",
            remedy=f"thence eval --regrade {store.folder} --grader {grader}",
            file=store.folder,
        )
    return Result(settings, store.environment(), rows, _groups(rows))


def task_result(store: Store, task: Task, grader: str, keys: Sequence[str] | None) -> TaskResult:
    """One task's numbers.

    Args:
        grader: whose grades count.
        keys: of the task's problems; None: of those that have samples.
    """
    grades = store.graded(task.name, grader)
    by_problem: dict[str, dict[int, tuple[Sample, GradeLine]]] = defaultdict(dict)
    for sample in store.samples(task.name):
        if sample.place in grades:
            by_problem[sample.problem][sample.sample] = sample, grades[sample.place]
    keys = list(by_problem) if keys is None else keys
    k, wanted = task.samples, set(keys)
    refused = {
        place: refusal
        for place, refusal in store.refusals(task.name).items()
        if place[0] in wanted and place[1] < task.samples
    }
    not_answered = {refusal.problem: refusal for refusal in refused.values()}
    complete = {
        key: [by_problem[key][i] for i in range(k)]
        for key in keys
        if key in by_problem and all(i in by_problem[key] for i in range(k))
    }
    counted = [pair for pairs in complete.values() for pair in pairs]
    verdicts = [grade.verdict for _, grade in counted]
    right = [sum(grade.verdict == "right" for _, grade in pairs) for pairs in complete.values()]
    answers = [[(grade.extracted, grade.verdict == "right") for _, grade in pairs] for pairs in complete.values()]
    graded, votes = verdicts.count("graded"), ":" not in grader or any(grade.extracted for _, grade in counted)
    scores = [[grade.score for _, grade in pairs if grade.verdict != "unknown"] for pairs in complete.values()]
    level = mean_reward_of(scores, k) if any(scores) else None
    told = [sample.tokens for sample, _ in counted if sample.tokens is not None]
    return TaskResult(
        task=task,
        grader=grader,
        versions=tuple(sorted({grade.version for _, grade in counted})),
        expected=len(keys),
        missing=len(keys) * k - len(refused) - sum(len(by_problem[key]) for key in keys if key in by_problem),
        avg=avg_at_k(right, k) if right and not graded else None,
        passed={n: pass_at_k(right, k, n) for n in _powers(k)} if right and not graded else {},
        majority=maj_at_k(answers, k) if right and k > 1 and not graded and votes else None,
        lenient=_lenient(store, task, list(complete)),
        right=verdicts.count("right"),
        wrong=verdicts.count("wrong"),
        unknown=verdicts.count("unknown"),
        truncated=sum(sample.finish in CUT for sample, _ in counted),
        short=sum(sample.room is not None for sample, _ in counted),
        mean_tokens=fmean(told) if told else None,
        shares={key: n / k for key, n in zip(complete, right, strict=True)},
        prompts=_digest({key: pairs[0][0].prompt for key, pairs in complete.items()}),
        not_answered={key: refusal.reason for key, refusal in not_answered.items()},
        not_answered_kinds=dict(Counter(refusal.kind for refusal in not_answered.values())),
        other_ends=dict(Counter(s.finish for s, _ in counted if s.finish not in ("stop", *CUT))),
        graded=graded,
        never=0 if graded else right.count(0),
        always=0 if graded else right.count(k),
        reward=level if graded else None,
        mean_reward=level,
    )


def _lenient(store: Store, task: Task, keys: Sequence[str]) -> Score | None:
    if not task.choices or not keys:
        return None
    grades = store.graded(task.name, LETTER)
    verdicts = [[grades.get((key, i)) for i in range(task.samples)] for key in keys]
    if any(grade is None for row in verdicts for grade in row):
        return None
    return avg_at_k([sum(g is not None and g.verdict == "right" for g in row) for row in verdicts], task.samples)


def _digest(prompts: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json(sorted(prompts.items())).encode()).hexdigest()[:16]


def _powers(k: int) -> list[int]:
    """1, 2, 4, ... and k."""
    return sorted({2**i for i in range(k.bit_length()) if 2**i <= k} | {k})


def _groups(rows: Sequence[TaskResult]) -> tuple[GroupResult, ...]:
    by_name: dict[str, list[tuple[str, Score | None]]] = defaultdict(list)
    for row in rows:
        if row.task.group:
            by_name[row.task.group].append((row.task.name, row.avg))
    found = []
    for name, members in by_name.items():
        scores = [score for _, score in members if score is not None]
        if len(scores) == len(members) > 1:
            found.append(GroupResult(name, tuple(task for task, _ in members), mean_score(scores)))
    return tuple(found)


@dataclass(frozen=True)
class TaskDifference:
    """B minus A on one task."""

    task: Task
    a: float
    b: float
    paired: Paired


@dataclass(frozen=True)
class EvaluationComparison:
    """Two evaluations side by side.

    Attributes:
        rows: one a task that both have.
        groups: unweighted means of the differences over a group: (name, difference, low, high).
        unlike: settings in which the two differ besides the model, as (name, in A, in B).
        only: tasks that only one of them has.
    """

    a: Result
    b: Result
    rows: tuple[TaskDifference, ...]
    groups: tuple[tuple[str, float, float, float], ...]
    unlike: tuple[tuple[str, Any, Any], ...]
    only: tuple[str, ...]


def compare_evaluations(a: Store, b: Store, grader: str | None = None) -> EvaluationComparison:
    """Two evaluations on the same problems, task by task: B minus A.

    Args:
        grader: whose grades count in both; None: each task's own.

    Raises:
        UserError: no task in common; other problems in the two; no complete problem; one that does not exist.
    """
    first, second = summarise(a, grader), summarise(b, grader)
    theirs = {row.task.name: row for row in second.tasks}
    pairs = [(row, theirs[row.task.name]) for row in first.tasks if row.task.name in theirs]
    if not pairs:
        problem = f"{a.folder} and {b.folder} have no task in common"
        raise UserError(problem, remedy="compare evaluations of one suite", file=b.folder)
    rows = tuple(_difference(one, other, (a, b)) for one, other in pairs)
    names_a, names_b = ({row.task.name for row in result.tasks} for result in (first, second))
    unlike = (*_other_ways(first, second), *(found for one, other in pairs for found in _unlike(one, other)))
    return EvaluationComparison(first, second, rows, _group_differences(rows), unlike, tuple(sorted(names_a ^ names_b)))


def _difference(one: TaskResult, other: TaskResult, stores: tuple[Store, Store]) -> TaskDifference:
    for row, store in zip((one, other), stores, strict=True):
        if row.graded:
            raise UserError(
                f"{row.task.name} is graded by {row.grader} with degrees: it has no shares of right answers to compare",
                remedy=_states_right(row, store),
                file=store.folder,
            )
        if row.avg is None or row.missing:
            raise UserError(
                f"{row.task.name} is not finished: {row.missing} samples are missing",
                remedy="finish it: run its `thence eval` command again",
                file=store.folder,
            )
    # A problem that one of them could not be asked says nothing about their difference.
    left_out = {*one.not_answered, *other.not_answered}
    first, second = ({k: v for k, v in row.shares.items() if k not in left_out} for row in (one, other))
    if not first or not second:
        raise UserError(
            f"{one.task.name}: no problem that both were asked",
            remedy="run the two `thence eval` commands again: what was not answered is asked again",
            file=stores[1].folder,
        )
    return TaskDifference(one.task, fmean(first.values()), fmean(second.values()), paired(second, first))


def _states_right(row: TaskResult, store: Store) -> str:
    if row.task.environment is not None:
        return (
            "say from which score a rollout is right, and run its `thence eval` command again: --set right_from=SCORE"
        )
    return (
        "let the function state from which score a response is right (its attribute right_from), and grade the samples "
        f"again: thence eval --regrade {store.folder} --grader {row.grader}"
    )


def _other_ways(first: Result, second: Result) -> list[tuple[str, Any, Any]]:
    """Other ways to the responses than the tasks': who sampled, and through which chat template."""
    found = []
    for name in ("backend", "chat_template", "template_variables"):
        ours, theirs = getattr(first.settings, name), getattr(second.settings, name)
        if ours != theirs:
            found.append((name, ours, theirs))
    one, other = (result.environment.get("chat_template") for result in (first, second))
    if first.settings.chat_template == second.settings.chat_template != "own" and one and other and one != other:
        found.append(("text of the chat template", one, other))
    return found


def _unlike(one: TaskResult, other: TaskResult) -> list[tuple[str, Any, Any]]:
    """What differs besides the model, so that a difference need not be the model's."""
    ours, theirs = one.task.model_dump(mode="json"), other.task.model_dump(mode="json")
    ignored = ("files", "source", "title", "seed", "samples")
    found = [(key, ours[key], theirs[key]) for key in ours if key not in ignored and ours[key] != theirs[key]]
    if one.not_answered.keys() != other.not_answered.keys():
        found.append(("problems not answered, left out of both", len(one.not_answered), len(other.not_answered)))
    if one.prompts != other.prompts and one.shares.keys() == other.shares.keys():
        found.append(("prompts", one.prompts, other.prompts))
    if one.grader == other.grader and one.versions != other.versions:
        found.append(("grader's version", ", ".join(one.versions), ", ".join(other.versions)))
    return [(f"{one.task.name}: {key}", a, b) for key, a, b in found]


def _group_differences(rows: Sequence[TaskDifference]) -> tuple[tuple[str, float, float, float], ...]:
    """Means over groups, see :func:`thence.stats.proportion.joined`."""
    by_name: dict[str, list[TaskDifference]] = defaultdict(list)
    for row in rows:
        if row.task.group:
            by_name[row.task.group].append(row)
    found = []
    for name, members in by_name.items():
        if len(members) > 1:
            pairs = [row.paired for row in members]
            found.append((name, *joined([(pair.difference, pair.low, pair.high) for pair in pairs], -1.0)))
    return tuple(found)

"""The rows of a data file with their pass rates: how much of what an evaluation sampled for each of them is right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thence.data.selection import PASS_RATE
from thence.data.sources import open_table
from thence.errors import DataError, UserError
from thence.evaluate.problems import Problem, row_problems
from thence.evaluate.store import Store
from thence.evaluate.suites import Task
from thence.evaluate.summary import TaskResult, task_result


def rated_rows(store: Store, file: Path) -> list[dict[str, Any]]:
    """Every row of a file as it is, with the column `pass_rate`: the share of right responses to its problem.

    A row is found in the evaluation by its problem's text, so the file may have moved, and copies of a row get the same
    share. A verdict that is unknown counts as not right.

    Args:
        file: JSONL or Parquet.

    Raises:
        UserError: an evaluation of several tasks; one that is not complete; scores that are degrees.
        DataError: a row whose problem, or whose answer, is not the evaluation's; a row that cannot be read.
    """
    tasks = list(store.settings().tasks.values())
    if len(tasks) > 1:
        raise UserError(
            f"the evaluation has {len(tasks)} tasks, and pass rates are of one file",
            remedy=f"measure the file alone: thence eval MODEL --suite {file} --samples 8",
            file=store.folder,
        )
    task = tasks[0]
    result = task_result(store, task, task.grader, store.problems().get(task.name))
    _check_whole(store, result)
    answers = {sample.problem: sample.answer for sample in store.samples(task.name)}
    problems = {int(problem.source.rpartition(":")[2]): problem for problem in row_problems(task, file)}
    rates: dict[int, float] = {}
    for number, problem in problems.items():
        _check_row(store, problem, answers, file, number)
        rates[number] = result.shares[problem.key]
    table = open_table(str(file), split=task.split, wanted=(), others=True)
    return [_row(row, rates, number, file, task) for number, row in table.rows]


def _check_whole(store: Store, result: TaskResult) -> None:
    if result.graded:
        raise UserError(
            f"{result.graded:,} scores of the evaluation are degrees, and a pass rate counts right responses",
            remedy="say from which score on a response is right: --set right_from=SCORE, and evaluate again",
            file=store.folder,
        )
    lacking = result.expected - len(result.shares)
    if lacking:
        raise UserError(
            f"{lacking:,} of {result.expected:,} problems of the evaluation lack samples or grades",
            remedy="run its `thence eval` command again, which adds what is missing",
            file=store.folder,
        )


def _check_row(store: Store, problem: Problem, answers: Mapping[str, str | None], file: Path, number: int) -> None:
    remedy = f"measure all rows as they are: thence eval MODEL --suite {file} --samples 8, into another --folder"
    if problem.key not in answers:
        raise DataError(f"the row's problem is not in {store.folder}", remedy=remedy, file=file, line=number)
    if problem.answer != answers[problem.key]:
        said = f"the answer is {problem.answer!r}, and {store.folder} graded with {answers[problem.key]!r}"
        raise DataError(said, remedy=remedy, file=file, line=number, field="answer")


def _row(row: Any, rates: Mapping[int, float], number: int, file: Path, task: Task) -> dict[str, Any]:
    if number not in rates:
        wanted = ", ".join(f"{column} = {value!r}" for column, value in task.filter.items())
        raise DataError(
            f"the row is not one of those measured: their filter is {wanted}",
            remedy="measure the file without a filter",
            file=file,
            line=number,
        )
    return {**row, PASS_RATE: rates[number]}

"""The problems of a task: read from files, the hub or the embedded world, made into prompts, each one once."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from thence.data.layouts import FIELDS, answers_are_worked, choose_layout, other_columns, parse_row
from thence.data.numbers import number_text
from thence.data.order import stable_seed
from thence.data.problems import RowProblem
from thence.data.readers import HEAD_ROWS
from thence.data.sources import DataTable, open_table
from thence.data.worlds.named import WORLD
from thence.errors import DataError, UserError
from thence.evaluate.suites import OWN, Task
from thence.files import to_json
from thence.verify.own_function import Stated
from thence.verify.reward import load_reward

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a task.

    Attributes:
        task: the task's name.
        key: stable id: 16 hexadecimal digits of the SHA-256 of task and problem text (options in the source's order,
            system message left out), so that it does not depend on sampling, shuffling or the place in the file.
        messages: (role, content) of every turn that the model is given.
        text: the problem itself, as it is shown: with its options in their shown order.
        answer: the gold answer; of a problem with `options` the letter of the right one; None where there is none, for
            a grader that needs none.
        options: the texts of the options in the order shown, letters A, B, ...; empty where they stand in the text.
        source: "file:line".
        columns: what else the row holds, a JSON object as text, for your own function or environment; None where
            neither is asked.
        plain: the one message is text to go on from, without a chat template.
    """

    task: str
    key: str
    messages: tuple[tuple[str, str], ...]
    text: str
    answer: str | None
    options: tuple[str, ...] = ()
    source: str = ""
    plain: bool = False
    columns: str | None = None


@dataclass(frozen=True, slots=True)
class _Row:
    """A row before the template: own messages (or one plain text), and the question without its options."""

    messages: tuple[tuple[str, str], ...]
    question: str
    answer: str | None
    options: tuple[str, ...] = ()
    identity: str = ""
    plain: bool = False
    columns: str = ""


def load_problems(task: Task, data: Path | None = None, limit: int | None = None) -> list[Problem]:
    """The problems of a task, in the order of the source.

    Copies of a problem (the same text with the same answer) are one problem: how often it is sampled is the task's
    `samples`, not the number of its copies. Where your own function or environment reads the other columns too, rows of
    one text that differ in those are problems of their own.

    Args:
        data: a folder in which the task's `files` are looked for, or the file itself; None: the hub, or files with
            an absolute path.
        limit: only so many problems, from the beginning.

    Raises:
        UserError: no data; the message names both remedies, a file under --data and the hub.
        DataError: a row that cannot be used, copies of a problem with different answers, or no row that passes the
            task's filter.
    """
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} leaves no problem", remedy="give 1 or more, or none", field="--limit")
    if task.source == WORLD:
        return list(islice(_of_world(task), limit))
    found: dict[str, Problem] = {}
    for problem in _of_their_own(task, _of_table(task, _open(task, data))):
        known = found.setdefault(problem.key, problem)
        if known.answer != problem.answer:
            raise DataError(
                f"the same problem as {known.source}, with the answer {problem.answer!r} instead of {known.answer!r}",
                remedy="leave one of the two rows out",
                file=problem.source,
            )
        if len(found) == limit and known is problem:
            break
    if not found:
        wanted = ", ".join(f"{column} = {value!r}" for column, value in task.filter.items())
        problem = f"task {task.name}: no row has {wanted}" if wanted else f"task {task.name}: no rows"
        raise DataError(problem, remedy="check the file and the task's filter", field="filter")
    return list(found.values())


def _of_their_own(task: Task, problems: Iterator[Problem]) -> Iterator[Problem]:
    """The problems, those with a key of their own that have the text of one before and are another to who grades them.

    An environment is told the answer and the other columns, a function of your own the columns that it asks for.
    """
    first: dict[str, Problem] = {}
    told: bool | None = None
    for problem in problems:
        known = first.setdefault(problem.key, problem)
        others = [columns_digest(one) for one in (known, problem)]
        if task.environment is not None:
            others = [f"{digest} {one.answer}" for digest, one in zip(others, (known, problem), strict=True)]
        if others[0] != others[1]:
            told = _is_told_columns(task) if told is None else told
            if told:
                key = hashlib.sha256(f"{problem.key}\n{others[1]}".encode("utf-8", "surrogatepass")).hexdigest()[:16]
                problem = replace(problem, key=key)
        yield problem


def _is_told_columns(task: Task) -> bool:
    """Whether who grades the task is told the other columns. Raises UserError where it cannot be loaded."""
    if task.environment is not None:
        return True
    with load_reward(task.grader, workers=1) as grader:
        return bool(getattr(grader, "threshold", Stated()).columns)


def columns_digest(problem: Problem) -> str | None:
    """16 hexadecimal digits of the other columns of a problem's row, in any order; None: nobody reads them."""
    if problem.columns is None:
        return None
    plain = to_json(_in_order(json.loads(problem.columns or "{}")))
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _in_order(value: Any) -> Any:
    """The value with the keys of all its tables in order."""
    if isinstance(value, dict):
        return {key: _in_order(inner) for key, inner in sorted(value.items())}
    return [_in_order(inner) for inner in value] if isinstance(value, list) else value


def row_problems(task: Task, file: Path) -> Iterator[Problem]:
    """The problem of every row of a file that passes the task's filter, copies too.

    Args:
        file: JSONL or Parquet.

    Raises:
        UserError: no such file.
        DataError: a row that cannot be used.
    """
    return _of_their_own(task, _of_table(task, _open(task, file)))


def _of_world(task: Task) -> Iterator[Problem]:
    from thence.data.worlds.chain import SPLITS, problems

    if task.split not in SPLITS:
        remedy = f"use one of {', '.join(SPLITS)}"
        raise UserError(f"{WORLD} has no split {task.split!r}", remedy=remedy, field=f"{task.name}.split")
    assert task.problems is not None
    for number, made in enumerate(problems(task.split, task.problems, task.data_seed), start=1):
        row = _Row((("user", made.prompt),), made.prompt, made.answer, identity=made.prompt, plain=True)
        yield _shown(task, row, f"{WORLD}[{task.split}]:{number}")


def _open(task: Task, data: Path | None) -> DataTable:
    wanted = {*FIELDS, "options", "answer_index", *task.filter}
    for columns in task.columns.values():
        wanted |= {columns} if isinstance(columns, str) else set(columns)
    if data is not None and not data.exists():
        raise UserError("no such folder or file", remedy="check the path", file=data, field="--data")
    if file := _file(task, data):
        return open_table(str(file), split=task.split, wanted=wanted, others=_reads_columns(task))
    names = " or ".join(task.files)
    if not task.source:
        problem = f"task {task.name}: no file {names}" + (f" in {data}" if data else "")
        raise UserError(problem, remedy="give the folder that holds it with --data DIR", field="--data")
    try:
        return open_table(task.source, split=task.split, wanted=wanted, others=_reads_columns(task))
    except UserError as error:
        where = f"no file {names}" + (f" in {data}" if data else ", as no --data was given") + ", and " if names else ""
        by_file = f"give a folder that holds {names} with --data DIR; or, " if names else ""
        raise UserError(
            f"task {task.name}: {where}{task.source} cannot be read from the hub: {error.problem}",
            remedy=f"{by_file}to read {task.source}, pip install 'thence[datasets]' and connect to the network "
            "(a gated data set also needs its terms accepted and a login)",
            field=task.name,
        ) from error


def _reads_columns(task: Task) -> bool:
    """Whether who grades the task may look at other columns than those that thence reads."""
    return ":" in task.grader


def _file(task: Task, data: Path | None) -> Path | None:
    if data is not None and data.is_file():
        return data
    # A file with an absolute path (of the user's suite) is the same under any folder.
    paths = [Path(name) if data is None else data / name for name in task.files]
    return next((path for path in paths if path.is_absolute() or data is not None if path.is_file()), None)


def _of_table(task: Task, table: DataTable) -> Iterator[Problem]:
    from_file = not task.source or not table.name.startswith(f"{task.source}[")
    head = list(islice(table.rows, HEAD_ROWS))
    columns = set(table.columns or ()) | {name for _, row in head if isinstance(row, dict) for name in row}
    renames = _renames(task, columns)
    if from_file and (absent := sorted(set(task.filter) - columns)) and columns:
        remedy = f"correct the filter of task {task.name}; columns are {', '.join(sorted(columns))}"
        raise DataError(f"no column {', '.join(absent)}", remedy=remedy, file=table.name, field="filter")
    fields = columns | set(renames)
    choice = {"question", "options"} <= fields and not {"answer", "answer_index"}.isdisjoint(fields)
    layout = "" if choice or not columns else _layout(task, fields, table.name)
    worked = answers_are_worked([_fields(row, renames) for _, row in head if isinstance(row, dict)])
    for number, row in chain(head, table.rows):
        source = f"{table.name}:{number}"
        try:
            if isinstance(row, RowProblem):
                raise row
            if from_file and any(str(row.get(column)) != value for column, value in task.filter.items()):
                continue
            values = _fields(row, renames)
            if not columns:
                raise RowProblem("", "the row has no fields", "give it a question and an answer")
            parsed = _choice_row(task, values) if choice else _row(task, layout, values, source, worked)
        except RowProblem as problem:
            remedy = f"fix the row, or name its column in `columns` of task {task.name}"
            file, line = table.name, number
            raise DataError(problem.problem, remedy=remedy, file=file, line=line, field=problem.field or None) from None
        yield _shown(task, parsed, source)


def _layout(task: Task, fields: set[str], name: str) -> str:
    try:
        return choose_layout(fields, name)
    except DataError as error:
        remedy = f'name the columns: --set \'{task.name}.columns={{question = "COLUMN", answer = "COLUMN"}}\''
        raise DataError(error.problem, remedy=remedy, file=name, field="columns") from None


def _renames(task: Task, columns: set[str]) -> dict[str, str | tuple[str, ...]]:
    """The renames whose columns are all there."""
    return {
        field: names
        for field, names in task.columns.items()
        if columns.issuperset((names,) if isinstance(names, str) else names)
    }


def _fields(row: Mapping[str, Any], renames: Mapping[str, str | tuple[str, ...]]) -> dict[str, Any]:
    fields = dict(row)
    for field, names in renames.items():
        fields[field] = row.get(names) if isinstance(names, str) else [row.get(name) for name in names]
    return fields


def _row(task: Task, layout: str, values: dict[str, Any], source: str, worked: bool) -> _Row:
    """A row of any layout of `thence.data.layouts`; an answer in parts becomes one, joined by commas."""
    if isinstance(values.get("answer"), Sequence) and not isinstance(values["answer"], str):
        values["answer"] = ", ".join(x if isinstance(x, str) else number_text(x) for x in values["answer"])
    example = parse_row(layout, values, source=source, group="", worked=worked)
    if example.answer is None and task.environment is None:
        raise RowProblem("answer", "no answer to grade with", "give one")
    if example.prompt is not None:
        messages = (("user", example.prompt),)
        return _Row(messages, example.prompt, example.answer, (), example.prompt, True, example.columns)
    if example.tools or any(turn.reasoning or turn.tool_calls or turn.role == "tool" for turn in example.messages):
        raise RowProblem(
            "messages",
            "a problem with tools, tool calls or reasoning, which evaluation does not render",
            "give problems as text turns",
        )
    messages = tuple((turn.role, turn.content) for turn in example.messages)
    identity = "\n\n".join(content for role, content in messages if role != "system")
    return _Row(messages, example.question, example.answer, identity=identity, columns=example.columns)


def _choice_row(task: Task, values: Mapping[str, Any]) -> _Row:
    question, (options, labels) = values.get("question"), _options(values.get("options"))
    if not isinstance(question, str) or not question.strip():
        raise RowProblem("question", "missing or empty", "give the text")
    right = _right_option(task, values, options, labels)
    order = list(range(len(options)))
    identity = _with_options(question, options)
    if task.shuffle_options:
        random.Random(stable_seed("options", task.data_seed, task.name, identity)).shuffle(order)
    shown = tuple(options[place] for place in order)
    messages = (("user", _with_options(question, shown)),)
    return _Row(messages, question, LETTERS[order.index(right)], shown, identity, columns=other_columns(values))


def _options(value: Any) -> tuple[list[str], list[str]]:
    """The options' texts and their labels in the source, from a list or from ARC's {text, label}."""
    labels: list[str] | None = None
    if isinstance(value, Mapping):
        labels = [str(label) for label in value.get("label") or ()]
        value = value.get("text")
    if not isinstance(value, Sequence) or isinstance(value, str) or not 2 <= len(value) <= len(LETTERS):
        raise RowProblem("options", "not a list of 2 to 26 options", "give a list of texts")
    texts = [str(text).strip() for text in value if text is not None]
    if len(texts) < len(value) or (labels is not None and len(labels) != len(texts)):
        raise RowProblem("options", "an option without a text or a label", "give every option's text")
    return texts, labels if labels is not None else list(LETTERS[: len(texts)])


def _right_option(task: Task, values: Mapping[str, Any], options: Sequence[str], labels: Sequence[str]) -> int:
    """The place of the right option: an index, the column it stands in, its label or its text."""
    index, answer = values.get("answer_index"), values.get("answer")
    if isinstance(index, int) and not isinstance(index, bool) and 0 <= index < len(options):
        return index
    columns, column = task.columns.get("options"), task.columns.get("answer")
    if isinstance(columns, tuple) and column in columns:
        return columns.index(str(column))
    named = str(answer).strip()
    if named in labels:
        return list(labels).index(named)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return answer
    if list(options).count(named) == 1:
        return list(options).index(named)
    raise RowProblem("answer", f"{answer!r} names none of the options", "give the label, the text or the index of one")


def _with_options(question: str, options: Sequence[str]) -> str:
    listed = "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"{question.strip()}\n\n{listed}"


def _shown(task: Task, row: _Row, source: str) -> Problem:
    text = _with_options(row.question, row.options) if row.options else row.question
    if task.template == OWN:
        messages, plain = row.messages, row.plain
    else:
        messages, plain = (("user", _filled(task.template_text, row, text)),), task.is_plain
    if not plain and task.system is not None:
        own = messages[0][0] == "system"
        if own and not task.system:
            messages = messages[1:]
        elif task.system and not own:
            messages = (("system", task.system), *messages)
    digest = hashlib.sha256(f"{task.name}\n{row.identity}".encode()).hexdigest()
    columns = row.columns if _reads_columns(task) else None
    return Problem(task.name, digest[:16], messages, text, row.answer, row.options, source, plain, columns)


def _filled(template: str, row: _Row, text: str) -> str:
    """The template with the question in it; one that has a place for the options gets them there."""
    if "{options}" not in template:
        return template.replace("{question}", text)
    options = _with_options("", row.options).lstrip() if row.options else ""
    # In one pass, so that a question with "{options}" in its text stays as it is.
    before, _, after = template.partition("{options}")
    return before.replace("{question}", row.question) + options + after.replace("{question}", row.question)

"""The folder of an evaluation: what was asked for, every sample and every grade, kept through crashes.

Layout: ``evaluation.toml`` (the settings), ``environment.json``, ``problems.json`` (their keys),
``samples/<task>.jsonl`` and ``grades/<task>.jsonl`` (append-only, one line each), and what is written from them.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from pydantic import Field, ValidationError

from thence.errors import DataError, UserError
from thence.evaluate.problems import Problem
from thence.evaluate.suites import Task
from thence.files import write_atomically
from thence.recipe import Section
from thence.toml import to_toml

SETTINGS = "evaluation.toml"
LETTER = "letter"
"""Name under which grades by the lenient letter rule are kept."""
SYNC_SECONDS = 2.0


class Settings(Section):
    """What an evaluation is. Two folders with the same settings hold samples of the same distribution."""

    model: str
    """As the user named it."""
    stage: str | None = None
    """The stage of a run whose model it is."""
    gguf_file: str | None = None
    """Name of a GGUF file inside `model`."""
    backend: Literal["native", "endpoint", "vllm"] = "native"
    """What generates."""
    endpoint: str | None = None
    """Address of the server."""
    chat_template: str = "own"
    """own, none or a Jinja file; a server applies its own."""
    template_variables: dict[str, Any] = Field(default={})
    """Values of the chat template's variables."""
    suite: str
    """Name of the suite."""
    data: str | None = None
    """Folder in which files of the tasks were looked for."""
    limit: int | None = None
    """Only the first so many problems of every task."""
    tasks: dict[str, Task]
    """The tasks, resolved."""


FREE = ("data", "files", "title", "grader_seconds")  # problems are known by their text, wherever it was read


@dataclass(frozen=True, slots=True)
class Sample:
    """One response.

    Attributes:
        problem: key of the problem; with `sample` it names the response in its task.
        sample: number of the response, from 0.
        seed: of its random numbers.
        prompt: (role, content) of the messages.
        question, answer, options, source, plain: of the problem.
        text: the response as generated.
        tokens, finish, room: see `thence.evaluate.backends.Generation`.
    """

    problem: str
    sample: int
    seed: int
    prompt: tuple[tuple[str, str], ...]
    question: str
    answer: str
    text: str
    tokens: int | None
    finish: str
    room: int | None = None
    options: tuple[str, ...] = ()
    source: str = ""
    plain: bool = False

    def as_problem(self, task: str) -> Problem:
        """The problem that it answers."""
        return Problem(
            *(task, self.problem, self.prompt, self.question, self.answer, self.options, self.source, self.plain)
        )

    @property
    def place(self) -> tuple[str, int]:
        """What names a response in its task."""
        return self.problem, self.sample


@dataclass(frozen=True, slots=True)
class GradeLine:
    """One grade of one response; several graders may grade it, and of one grader the last line counts."""

    problem: str
    sample: int
    grader: str
    version: str
    verdict: str
    score: float
    extracted: str | None = None
    reason: str = ""


class Store:
    """An evaluation's folder.

    Args:
        folder: made by `begin`; every other method wants it to be there.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def exists(self) -> bool:
        """Whether the folder holds an evaluation."""
        return (self.folder / SETTINGS).is_file()

    def begin(self, settings: Settings) -> None:
        """Make the folder, or take up the evaluation that stands in it.

        Raises:
            UserError: the folder holds an evaluation with other settings, or something else.
        """
        if self.exists:
            _check_same(self.settings(), settings, self.folder / SETTINGS)
        elif self.folder.is_dir() and any(path.name != ".lock" for path in self.folder.iterdir()):
            raise UserError("the folder holds no evaluation", remedy="give another --folder", file=self.folder)
        write_atomically(self.folder / SETTINGS, to_toml(settings.model_dump(mode="json", exclude_none=True)))

    def settings(self) -> Settings:
        """The settings. Raises UserError where they cannot be read."""
        path = self.folder / SETTINGS
        try:
            return Settings.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UserError(
                "no evaluation here", remedy="give the folder that `thence eval` printed", file=self.folder
            ) from None
        except (tomllib.TOMLDecodeError, ValidationError) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(f"cannot be read: {first}", remedy="evaluate into another --folder", file=path) from error

    def environment(self) -> dict[str, Any]:
        """What was known of machine, versions and model at the first start; empty before it."""
        path = self.folder / "environment.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def record_start(self, facts: Mapping[str, Any]) -> None:
        """Keep the facts of a start; those of later starts stand beside the first one's.

        Raises:
            UserError: the model has other weights than those whose samples are here.
        """
        first = self.environment()
        before, now = first.get("weights"), facts.get("weights")
        if before and now and before != now:
            raise UserError(
                f"the model has changed since the samples here were made (weights {before}, now {now})",
                remedy="give another --folder for the new weights",
                file=self.folder,
            )
        if first:
            changed = {key: value for key, value in facts.items() if first.get(key) != value}
            whole = {**first, "later_starts": [*first.get("later_starts", []), changed]}
        else:
            whole = dict(facts)
        write_atomically(self.folder / "environment.json", json.dumps(whole, indent=1) + "\n")

    def write_problems(self, keys: Mapping[str, Sequence[str]]) -> None:
        """Keep the keys of every task's problems, so that it is known what is missing."""
        write_atomically(self.folder / "problems.json", json.dumps(keys, indent=1) + "\n")

    def problems(self) -> dict[str, list[str]]:
        """The keys of every task's problems; empty before the first start."""
        path = self.folder / "problems.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def samples(self, task: str) -> list[Sample]:
        """All samples of a task, in the order in which they ended. Raises DataError at a damaged line."""
        path = self.folder / "samples" / f"{task}.jsonl"
        return [_from_line(Sample, line, path, number) for number, line in enumerate(read_lines(path), start=1)]

    def grades(self, task: str) -> list[GradeLine]:
        """All grades of a task, in the order in which they were given. Raises DataError at a damaged line."""
        path = self.folder / "grades" / f"{task}.jsonl"
        return [_from_line(GradeLine, line, path, number) for number, line in enumerate(read_lines(path), start=1)]

    def graded(self, task: str, grader: str, version: str | None = None) -> dict[tuple[str, int], GradeLine]:
        """The last grade that a grader (of this version, if one is named) gave to each response."""
        return {
            (grade.problem, grade.sample): grade
            for grade in self.grades(task)
            if grade.grader == grader and version in (None, grade.version)
        }

    def write_samples(self, task: str) -> Lines:
        """Where samples of a task are added; a context manager."""
        return Lines(self.folder / "samples" / f"{task}.jsonl")

    def write_grades(self, task: str) -> Lines:
        """Where grades of a task are added; a context manager."""
        return Lines(self.folder / "grades" / f"{task}.jsonl")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder, so that no other process adds to it. Raises UserError where one does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    "another process is adding to this evaluation",
                    remedy="wait for it, or give another --folder",
                    file=self.folder,
                ) from None
            yield


class Lines:
    """Lines added to a JSONL file. Each is handed to the system at once: killing the process loses none.

    They are forced to the disk every two seconds and at the end. A last line that a crash has cut is removed first.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_last_line(path)
        self._file = path.open("ab")
        self._synced = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sync()
        self._file.close()

    def add(self, row: Sample | GradeLine) -> None:
        """Append one line."""
        defaults = {field.name: field.default for field in fields(row)}
        plain = {key: value for key, value in asdict(row).items() if value != defaults[key]}
        self._file.write(json.dumps(plain).encode() + b"\n")
        self._file.flush()
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; a last line that a crash has cut is left out; no file is an empty one.

    Raises:
        DataError: a line before the last one cannot be read.
    """
    if not path.is_file():
        return
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    lines = whole.split(b"\n") if whole else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            yield row
        elif number < len(lines):
            raise DataError(
                "this line is damaged", remedy="remove it: what it held is generated again", file=path, line=number
            )


def _cut_last_line(path: Path) -> None:
    """Remove a last line that has no end or is no JSON."""
    if not path.is_file():
        return
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    last = whole.rpartition(b"\n")[2]
    keep = len(whole) + 1 if whole else 0
    if whole:
        try:
            json.loads(last)
        except ValueError:
            keep = len(whole) - len(last)
    if keep != path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(keep)


def _from_line(kind: type, line: dict[str, Any], path: Path, number: int) -> Any:
    names = {field.name for field in fields(kind)}
    try:
        row = {key: value for key, value in line.items() if key in names}
        if kind is Sample:
            row["prompt"] = tuple((role, content) for role, content in row["prompt"])
            row["options"] = tuple(row.get("options", ()))
        return kind(**row)
    except (TypeError, ValueError, KeyError) as error:
        raise DataError(
            f"not a line of an evaluation: {error}",
            remedy="remove it: what it held is generated again",
            file=path,
            line=number,
        ) from error


def _check_same(kept: Settings, asked: Settings, file: Path) -> None:
    before, now = _flat(kept.model_dump(mode="json")), _flat(asked.model_dump(mode="json"))
    for path in sorted({*before, *now}):
        old, new, name = before.get(path), now.get(path), ".".join(path)
        if old == new or path[-1] in FREE:
            continue
        may_grow = path == ("limit",) or (path[0] == "tasks" and path[2:] == ("samples",))
        if may_grow and old is not None and (new is None or new > old):
            continue  # samples are only added
        remedy = "give another --folder"
        if may_grow:
            remedy += ", or at least as many as before"
        if path[-1] == "grader":
            remedy += f", or grade these samples again: thence eval --regrade {file.parent} --grader {new}"
        raise UserError(f"holds an evaluation with {old!r}, not {new!r}", remedy=remedy, file=file, field=name)


def _flat(values: Mapping[str, Any], before: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Nested tables as paths to values; empty tables and None, which TOML cannot hold, are left out."""
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, (*before, key))
        elif value is not None:
            flat[(*before, key)] = value
    return flat

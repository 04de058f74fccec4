"""The folder of an evaluation: what was asked for, every sample and every grade, kept through crashes.

Layout: ``evaluation.toml`` (the settings), ``environment.json``, ``problems.json`` (their keys),
``samples/<task>.jsonl``, ``grades/<task>.jsonl`` and ``refused/<task>.jsonl`` (append-only, one line each), and what is
written from them.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, TypeAdapter

from thence.errors import DamagedFile, UserError, first_line
from thence.evaluate.backends import GivenScore
from thence.evaluate.problems import Problem, columns_digest
from thence.evaluate.refusals import Refusal, read_refusals, refusals_path
from thence.evaluate.store_lines import Whole, read_store_lines, wrong_with
from thence.evaluate.suites import Task
from thence.files import is_environment, keep_damaged, read_json, to_json, write_atomically
from thence.http_client import shown_address, shown_addresses
from thence.jsonl import repair_lines
from thence.locks import LOCK, held
from thence.records import read_record
from thence.settings.limits import Count, Name
from thence.settings.section import Section
from thence.toml import to_toml

log = logging.getLogger(__name__)
SETTINGS = "evaluation.toml"
LEFT_OUT = "it is left out; `thence eval` samples again what it held"
SYNC_SECONDS = 2.0
_KEYS = TypeAdapter(dict[str, list[str]])
BEGINNINGS = (LOCK, f".{SETTINGS}.writing")
"""What a process leaves that is killed before it has written the settings."""


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
    """Address of the server, without user, password and the values of its query."""
    chat_template: str = "own"
    """own, none or a Jinja file; a server applies its own."""
    template_variables: dict[str, Any] = Field(default={})
    """Values of the chat template's variables."""
    suite: Name
    """Name of the suite."""
    data: str | None = None
    """Folder in which files of the tasks were looked for."""
    limit: Count | None = None
    """Only the first so many problems of every task."""
    tasks: dict[Name, Task]
    """The tasks, resolved."""


FREE = (("files",), ("title",), ("grader_seconds",), ("environment", "seconds"), ("environment", "processes"))
"""Fields of a task that may change: problems are known by their text, wherever it was read."""


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
        tokens, finish, room, score, turns: see `thence.evaluate.backends.Generation`.
        columns: a digest of the row's other columns, where the grader is told them; None: it is not, or the sample is
            of an older version.
    """

    problem: str
    sample: Whole
    seed: Whole
    prompt: tuple[tuple[str, str], ...]
    question: str
    answer: str | None
    text: str
    tokens: Whole | None
    finish: str
    room: Whole | None = None
    options: tuple[str, ...] = ()
    source: str = ""
    plain: Annotated[bool, Strict()] = False
    score: GivenScore | None = None
    turns: tuple[tuple[str, str], ...] = ()
    columns: str | None = None

    @property
    def said(self) -> str:
        """What graders of texts read: the response, and of several turns the policy's words alone."""
        policy = [text for who, text in self.turns if who == "policy"]
        return "\n".join(policy) if policy else self.text

    def answers(self, problem: Problem) -> bool:
        """Whether it is a response to the problem as it is now."""
        same = problem.messages == self.prompt and problem.answer == self.answer
        return same and self.columns in (None, columns_digest(problem))

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
    """One grade of one response; several graders may grade it, and of one grader the last line counts.

    Attributes:
        components: what the score is made of, by name, where a reward function says so; lines of older versions
            have none.
    """

    problem: str
    sample: Whole
    grader: str
    version: str
    verdict: Literal["right", "wrong", "graded", "unknown"]
    score: Annotated[float, Strict()]
    extracted: str | None = None
    reason: str = ""
    components: dict[str, Annotated[float, Strict()]] | None = None


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
            DamagedFile: its settings or environment cannot be read; nothing is written.
        """
        self.check(settings)
        write_atomically(self.folder / SETTINGS, to_toml(settings.model_dump(mode="json", exclude_none=True)))

    def check(self, settings: Settings) -> None:
        """Raise the UserError of :meth:`begin`, and write nothing."""
        if self.exists:
            _check_same(self.settings(), settings, self.folder / SETTINGS)
            self.environment()
        elif self.folder.is_dir() and any(path.name not in BEGINNINGS for path in self.folder.iterdir()):
            raise UserError("the folder holds no evaluation", remedy="give another --folder", file=self.folder)

    def settings(self) -> Settings:
        """The settings. Raises UserError where there are none, DamagedFile where they cannot be read."""
        path = self.folder / SETTINGS
        remedy = "put a whole copy of it back, or evaluate into another --folder; the samples here stay as they are"
        try:
            return read_record(path, Settings, remedy=remedy)
        except FileNotFoundError:
            raise UserError(
                "no evaluation here", remedy="give the folder that `thence eval` printed", file=self.folder
            ) from None

    def environment(self) -> dict[str, Any]:
        """What was known of machine, versions and model at the first start; empty before it. Raises DamagedFile."""
        path = self.folder / "environment.json"
        if not path.exists():
            return {}
        remedy = (
            "put a whole copy of it back; or rename it, and a new one is written, which does not know the weights that "
            "the samples here were made with"
        )
        found = read_json(path, remedy=remedy, shape=is_environment)
        hidden = {"endpoint": shown_address, "command": shown_addresses}  # older versions kept passwords
        return {key: hidden[key](value) if key in hidden and value else value for key, value in found.items()}

    def record_start(self, facts: Mapping[str, Any]) -> None:
        """Keep the facts of a start; those of later starts stand beside the first one's.

        Raises:
            UserError: as :meth:`check_unchanged`.
        """
        first = self.environment()
        self.check_unchanged(facts)
        if first:
            changed = {key: value for key, value in facts.items() if first.get(key) != value}
            whole = {**first, "later_starts": [*first.get("later_starts", []), changed]}
        else:
            whole = dict(facts)
        write_atomically(self.folder / "environment.json", to_json(whole, indent=1) + "\n")

    def check_unchanged(self, facts: Mapping[str, Any]) -> None:
        """Refuse facts of another model than the one whose samples are here, as far as either is told.

        Raises:
            UserError: other weights, files of weights, served model or text of the chat template.
        """
        first, since = self.environment(), "has changed since the samples here were made"
        changed = {
            "weights": f"the model {since} (weights {{}}, now {{}})",
            "weight_files": f"the model {since} (files {{}}, now {{}})",
            "chat_template": f"the text of the chat template {since}",
        }
        if facts.get("backend") == first.get("backend") == "endpoint":
            changed["model"] = f"the served model {since} ({{}}, now {{}})"
        for key, problem in changed.items():
            before, now = first.get(key), facts.get(key)
            if before and now and before != now:
                raise UserError(problem.format(before, now), remedy="give another --folder for it", file=self.folder)

    def write_problems(self, keys: Mapping[str, Sequence[str]]) -> None:
        """Keep the keys of every task's problems, so that it is known what is missing; a damaged file is kept too."""
        path = self.folder / "problems.json"
        try:
            self.problems()
        except DamagedFile as error:
            log.warning("%s; it is kept as %s and written again", first_line(error), keep_damaged(path).name)
        write_atomically(path, to_json(keys, indent=1) + "\n")

    def problems(self) -> dict[str, list[str]]:
        """The keys of every task's problems; empty before the first start. Raises DamagedFile."""
        path = self.folder / "problems.json"
        if not path.exists():
            return {}
        remedy = "run this folder's `thence eval` command again: it writes the file, and keeps this one aside"
        return read_json(path, remedy=remedy, shape=lambda keys: bool(keys) and _KEYS.validate_python(keys))

    def samples(self, task: str) -> list[Sample]:
        """All samples of a task, in the order in which they ended; damaged lines are named in the log and left out."""
        return read_store_lines(self.folder / "samples" / f"{task}.jsonl", Sample, LEFT_OUT)

    def grades(self, task: str) -> list[GradeLine]:
        """All grades of a task, in the order in which they were given; damaged lines are named and left out."""
        return read_store_lines(self.folder / "grades" / f"{task}.jsonl", GradeLine, LEFT_OUT)

    def graded(self, task: str, grader: str, version: str | None = None) -> dict[tuple[str, int], GradeLine]:
        """The last grade that a grader (of this version, if one is named) gave to each response."""
        return {
            (grade.problem, grade.sample): grade
            for grade in self.grades(task)
            if grade.grader == grader and version in (None, grade.version)
        }

    def amend_start(self, changes: Mapping[str, Any]) -> None:
        """Keep facts of this start that have shown only while it sampled, in the place of what was recorded."""
        whole = self.environment()
        later = whole.get("later_starts")
        (later[-1] if later else whole).update(changes)
        write_atomically(self.folder / "environment.json", to_json(whole, indent=1) + "\n")

    def refusals(self, task: str) -> dict[tuple[str, int], Refusal]:
        """The last refusal of each request of a task that has no sample."""
        return read_refusals(self.folder, task, {sample.place for sample in self.samples(task)})

    def write_refusals(self, task: str) -> LineWriter:
        """Where refusals of a task are added; a context manager."""
        return LineWriter(refusals_path(self.folder, task), wrong_with(Refusal))

    def write_samples(self, task: str) -> LineWriter:
        """Where samples of a task are added; a context manager."""
        return LineWriter(self.folder / "samples" / f"{task}.jsonl", wrong_with(Sample))

    def write_grades(self, task: str) -> LineWriter:
        """Where grades of a task are added; a context manager."""
        return LineWriter(self.folder / "grades" / f"{task}.jsonl", wrong_with(GradeLine))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder, so that no other process adds to it. Raises UserError where one does."""
        with held(self.folder, "is adding to this evaluation"):
            yield


class LineWriter:
    """Lines added to a JSONL file. Each is handed to the system at once: killing the process loses none.

    They are forced to the disk every two seconds and at the end. A last line that a crash has cut is removed first, and
    damaged lines are set aside in ``NAME.damaged``: what they held is missing, and is sampled again.
    """

    def __init__(self, path: Path, check: Callable[[dict[str, Any]], str | None]):
        path.parent.mkdir(parents=True, exist_ok=True)
        repair_lines(path, check)
        self._file = path.open("ab")
        self._synced = time.monotonic()

    def __enter__(self) -> LineWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sync()
        self._file.close()

    def add(self, row: Sample | GradeLine | Refusal) -> None:
        """Append one line."""
        defaults = {field.name: field.default for field in fields(row)}
        plain = {key: value for key, value in asdict(row).items() if value != defaults[key]}
        self._file.write(to_json(plain).encode() + b"\n")
        self._file.flush()
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


def _check_same(kept: Settings, asked: Settings, file: Path) -> None:
    before, now = _flat(kept.model_dump(mode="json")), _flat(asked.model_dump(mode="json"))
    for path in sorted({*before, *now}):
        old, new, name = before.get(path), now.get(path), ".".join(path)
        if path == ("endpoint",) and old and new:  # with another password it is the same server
            old, new = shown_address(old), shown_address(new)
        if old == new or path == ("data",) or (path[0] == "tasks" and path[2:] in FREE):
            continue
        if path[0] == "tasks" and path[2:] == ("right_from",) and old is None:
            continue  # not kept by older versions; the samples are graded again
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

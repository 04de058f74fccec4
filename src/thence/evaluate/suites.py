"""Suites: which benchmarks are measured, where their problems come from, how they are asked, sampled and graded.

A suite is a small TOML file: a name, a description, `[defaults]` for all tasks, and one `[[tasks]]` each. The shipped
ones lie in the folder `suites`. Nothing here imports torch or reads data.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, Strict, field_validator, model_validator

from thence.data.sources import JSON_SUFFIXES, PARQUET_SUFFIXES
from thence.data.worlds.named import WORLD, is_of_world
from thence.errors import RecipeError, UserError
from thence.names import as_name, same_file
from thence.recipe.schema import environment_table
from thence.recipe.tables import Environment
from thence.settings.annotations import type_at
from thence.settings.limits import (  # fmt: skip
    Name,
    Place,
    Rows,
    Seconds,
    Seed,
    Signed,
    SomeShare,
    Temperature,
    Text,
    Tokens,
    Written,
)
from thence.settings.section import Section
from thence.settings.text_values import read_value
from thence.settings.toml_file import TomlFile, read_toml
from thence.settings.validation import validated

OWN = "own"
TEMPLATES: dict[str, str] = {
    "question": "{question}",
    "boxed": "{question}\n\nThink step by step and put the final answer in \\boxed{}.",
    "letter": "{question}\n\nThink step by step and put only the letter of the right option in \\boxed{}.",
    "steps": "User: {question}\nAnswer: Let's think step by step.\n",
}
"""Named prompt templates. `steps` is the plain prompt of Llama base models in arXiv 2504.14945, without system text."""

PLAIN = frozenset({"steps"})
TABLES = frozenset({"environment", "columns", "filter"})
"""Fields of a task that are tables; an override may set one of their own fields."""


class Task(Section):
    """One benchmark of a suite. The defaults of sampling are those of section 4 of arXiv 2604.23747."""

    name: Annotated[Name, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """Short name, for tables and file names."""
    title: Text = ""
    """Name for readers; default: `name`."""
    group: Text = ""
    """Tasks of a group are averaged: ID (in distribution), OOD (out of distribution) or any other word."""
    source: Text = ""
    """Hugging Face data set, `owner/name` or `owner/name:config`, for when no file is found; or `world:chain`."""
    split: Place = "test"
    """Split of `source`."""
    files: tuple[Place, ...] = ()
    """Names looked for in the folder given as --data, in this order. For the user's suite also beside its TOML file."""
    columns: dict[str, Text | Annotated[tuple[Text, ...], Strict(False)]] = Field(default_factory=dict)
    """Renames: field = column. Fields are those of data sets, and `options` (a list, or several columns) and
    `answer_index`. A rename whose column a file lacks is not applied to it."""
    filter: dict[str, Written] = Field(default_factory=dict)
    """Of `files`, only rows with these values: column = value."""
    template: Text = OWN
    """own: the data set's messages, or its question. Else a name (question, boxed, letter, steps) or a text with
    {question}, and perhaps {options}, that takes the place of the whole conversation."""
    plain: bool = False
    """The text of `template` is given to the model as it is, without a chat template."""
    system: Text | None = None
    """System message put before every prompt that has none; an empty text removes the data set's own."""
    problems: Rows | None = None
    """How many problems `world:chain` makes."""
    choices: bool = False
    """Multiple choice: the lenient letter rule is a second column."""
    shuffle_options: bool = False
    """Put the options into a random order that follows from `data_seed` and the problem."""
    data_seed: Seed = 0
    """Seed of that order and of the problems of `world:chain`; another sampling seed does not change the problems."""
    samples: Rows = 1
    """Responses for each problem: the score is avg@samples."""
    temperature: Temperature = 0.6
    """Of sampling; 0 is greedy."""
    top_p: SomeShare = 1.0
    """Nucleus sampling; 1: off."""
    max_tokens: Tokens = 8192
    """Longest response."""
    grader: Place = "math"
    """exact, math, math-after-think, math-boxed, or your own function: package.module:function or file.py:function."""
    grader_seconds: Seconds = 10.0
    """Time limit of one answer check, or of one call of your own function."""
    right_from: Signed | None = None
    """The score from which a response is right, for your own function. Default: what the function states."""
    environment: Environment | None = None
    """Rollouts of several turns: your own class (file.py:Class), or a table. It gives the scores. See docs/turns.md."""
    seed: Seed = 0
    """Every random number of sampling follows from it."""

    @field_validator("environment", mode="before")
    @classmethod
    def _environment(cls, value: Any) -> Any:
        return environment_table(value)

    @model_validator(mode="before")
    @classmethod
    def _environment_scores(cls, given: Any) -> Any:
        played = environment_table(given.get("environment")) if isinstance(given, dict) else None
        if not isinstance(played, dict) or not isinstance(path := played.get("path"), str):
            return given
        if given.get("grader", path) != path:
            raise ValueError("grader and environment both give scores: leave grader out")
        return {**given, "grader": path}

    @model_validator(mode="after")
    def _makes_sense(self) -> Task:
        if not self.source and not self.files:
            raise ValueError("no data: set files or source")
        if is_of_world(self.source) and self.source != WORLD:
            raise ValueError(f"{self.source}: the only world is {WORLD}, and its parameters change no problem")
        if self.source == WORLD and self.problems is None:
            raise ValueError(f"{WORLD} makes as many problems as asked: set problems")
        if self.right_from is not None and ":" not in self.grader:
            raise ValueError(f"right_from is for a function of your own, not for the grader {self.grader}")
        if self.environment is not None and self.choices:
            raise ValueError("choices asks for the letter of one answer, and a rollout has several turns: leave it out")
        if self.template != OWN and "{question}" not in self.template_text:
            names = ", ".join((OWN, *TEMPLATES))
            raise ValueError(f"template is neither one of {names} nor a text with {{question}}")
        if self.is_plain and self.system:
            raise ValueError(
                "a plain template has no system message: write it into the template, and set system to an empty text"
            )
        return self

    @property
    def template_text(self) -> str:
        """The text behind `template` where it is a name."""
        return TEMPLATES.get(self.template, self.template)

    @property
    def is_plain(self) -> bool:
        """Whether prompts made by the template go to the model without a chat template."""
        return self.template != OWN and (self.plain or self.template in PLAIN)


class Suite(Section):
    """A named list of tasks."""

    name: Name
    """Name for folders and tables."""
    description: Text = ""
    """One line, shown by `thence eval --list`."""
    tasks: tuple[Task, ...] = Field(min_length=1)
    """The benchmarks, in the order of the table."""

    @model_validator(mode="after")
    def _names_differ(self) -> Suite:
        names = [task.name for task in self.tasks]
        if same := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two tasks are called {', '.join(same)}")
        if twice := same_file(names):
            raise ValueError(f"two tasks would share a file: {' and '.join(twice)}")
        return self


def shipped_suites() -> dict[str, Path]:
    """The suites that come with the package, by name."""
    folder = Path(str(resources.files("thence") / "evaluate" / "suites"))
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def load_suite(name_or_file: str, overrides: Mapping[str, Any] | None = None) -> Suite:
    """A shipped suite, a suite of the user's (TOML), or a data file (JSONL, Parquet) as a suite of one task.

    Args:
        name_or_file: name of a shipped suite, or a path.
        overrides: `field` for all tasks or `task.field` for one, to values; texts are parsed as TOML values. A field
            of a table is `environment.max_turns`. `tasks` takes the names of the tasks to keep.

    Raises:
        RecipeError: no such suite, not valid TOML, an unknown key or task, a value that makes no sense.
    """
    shipped = shipped_suites()
    path = shipped.get(name_or_file, Path(name_or_file).expanduser())
    lowered = path.name.lower()
    of_data = lowered.endswith(JSON_SUFFIXES + PARQUET_SUFFIXES)
    file = TomlFile(path, _of_data_file(path), "") if of_data else _read(name_or_file, path, shipped)
    tables = dict(file.tables)
    given = overrides or {}
    tables["tasks"] = _with_overrides(_tasks(tables, path), given, path)
    tables.pop("defaults", None)
    try:
        return _suite(tables, file)
    except RecipeError as error:
        at, names = (error.field or "").removeprefix("tasks."), [str(task.get("name")) for task in tables["tasks"]]
        task = next((name for name in names if at == name or at.startswith(f"{name}.")), at.partition(".")[0])
        field = at.removeprefix(task).removeprefix(".")
        plain = {name.replace("-", "_"): name for name in given}
        # what a task says of several fields begins with the name of the one at fault
        set_by = plain.get(f"{task}.{field}") or plain.get(field or error.problem.split()[0])
        if set_by is None:
            raise
        raise RecipeError(error.problem, remedy=error.remedy, field=set_by) from None  # not from the file


def _of_data_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError("no such file", remedy="check the path; relative paths start at the current folder", file=path)
    name = as_name(path.name.partition(".")[0].replace(".", "-") or "own")
    task = {"name": name, "files": [str(path.resolve())]}
    return {"name": name, "description": f"the problems of {path}", "tasks": [task]}


def _read(name: str, path: Path, shipped: Mapping[str, Path]) -> TomlFile:
    try:
        return read_toml(path, "a suite", field="--suite")
    except (FileNotFoundError, NotADirectoryError):
        near = difflib.get_close_matches(name, shipped, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RecipeError(
            f"no suite {name!r}",
            remedy=f"{hint}give one of {', '.join(shipped)}, your own TOML file, or a .jsonl or .parquet file",
            field="--suite",
        ) from None


def _tasks(tables: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    """The tables of the tasks with the defaults under them, and files that lie beside the TOML file found."""
    defaults, tasks = tables.get("defaults", {}), tables.get("tasks", [])
    if not isinstance(defaults, dict):
        raise RecipeError("defaults is not a table", remedy="write [defaults]", file=path, field="defaults")
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise RecipeError("tasks is not a list of tables", remedy="write [[tasks]]", file=path, field="tasks")
    merged = [{**defaults, **task} for task in tasks]
    for task, own in zip(merged, tasks, strict=True):
        if "environment" in own and "grader" not in own:
            task.pop("grader", None)  # a default, which the environment takes the place of
    for task in merged:
        files = task.get("files", ())
        if not isinstance(files, list | tuple):
            continue  # which the schema says
        beside = {name: path.resolve().parent / name for name in files if isinstance(name, str)}
        task["files"] = [str(beside[name]) if name in beside and beside[name].is_file() else name for name in files]
    return merged


def _with_overrides(tasks: list[dict[str, Any]], overrides: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    values = {
        name: read_value(value, _type_of(name)) if isinstance(value, str) else value
        for name, value in overrides.items()
    }
    names = [str(task.get("name")) for task in tasks]
    if (chosen := values.pop("tasks", None)) is not None:
        wanted = [chosen] if isinstance(chosen, str) else list(chosen)
        for name in wanted:
            _check_task(name, names, path, "tasks")
        tasks = [task for task in tasks if task.get("name") in wanted]
    # What holds for all tasks goes first, so that what is said of one task wins in any order; tables before fields.
    placed = sorted(
        ((*_place(dotted, names), dotted) for dotted in values), key=lambda one: (len(one[1]), one[0] != "")
    )
    for name, fields, dotted in placed:
        if name:
            _check_task(name, names, path, dotted)
        asked = [task for task in tasks if not name or task.get("name") == name]
        if len(fields) > 1 and not name:  # a field of a table that only some tasks have
            asked = [task for task in asked if task.get(fields[0])] or asked
        for task in asked:
            _set(task, fields, values[dotted])
            if fields == ["environment"] and not any(
                its == ["grader"] and of in ("", task.get("name")) for of, its, _ in placed
            ):
                task.pop("grader", None)  # the suite's own, which the environment takes the place of
    return tasks


def _place(dotted: str, tasks: Sequence[str]) -> tuple[str, list[str]]:
    """The task that an override names (empty: all), and the path of its field."""
    parts = dotted.split(".")
    for size in range(len(parts) - 1, 0, -1):  # a task's name may have dots
        if (name := ".".join(parts[:size])) in tasks:
            return name, [part.replace("-", "_") for part in parts[size:]]
    path = [part.replace("-", "_") for part in parts]
    if len(path) == 1 or path[0] in TABLES:
        return "", path
    return ".".join(parts[:-1]), path[-1:]


def _set(task: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set a field of a task, or of a table in it."""
    if len(path) == 1:
        task[path[0]] = value
        return
    held = environment_table(task.get(path[0], {}))
    table = dict(held) if isinstance(held, Mapping) else {}
    table[".".join(path[1:])] = value
    task[path[0]] = table


def _type_of(dotted: str) -> Any:
    fields = [part.replace("-", "_") for part in dotted.split(".")]
    if fields == ["tasks"]:
        return list[str]
    return type_at(Task, fields[-2:] if len(fields) > 1 and fields[-2] in TABLES else fields[-1:])


def _check_task(name: str, names: list[str], path: Path, field: str) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RecipeError(f"no task {name!r}", remedy=f"{hint}tasks are: {', '.join(names)}", file=path, field=field)


def _suite(tables: Mapping[str, Any], file: TomlFile) -> Suite:
    named = dict(enumerate(str(task.get("name", place + 1)) for place, task in enumerate(tables["tasks"])))
    return validated(Suite, {"name": as_name(file.path.stem), **tables}, file=file, names=named)

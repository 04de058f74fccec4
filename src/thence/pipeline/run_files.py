"""Read a run's folder, finished or not: whatever is missing or cut off is left out, never an error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thence.errors import DamagedFile, UserError, first_line
from thence.files import read_json, read_own_toml
from thence.jsonl import damaged_lines, read_lines
from thence.pipeline.owned import EVALUATION
from thence.recipe import KINDS, kind_of, load_recipe

_COUNTS = ("problems", "samples", "right", "wrong", "unknown", "truncated", "graded")


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one model reached on one split at one temperature; shares are between 0 and 1.

    ``accuracy`` is None where the reward gives degrees and states no threshold; ``reward`` is the mean score then.
    """

    subject: str
    stage: str
    split: str
    temperature: float
    accuracy: float | None
    low: float | None
    high: float | None
    problems: int | None
    samples: int | None
    right: int | None
    wrong: int | None
    unknown: int | None
    truncated: int | None
    """Responses that reached the limit of tokens."""
    mean_tokens: float | None
    graded: int | None = None
    """Scores that are neither right nor wrong."""
    reward: float | None = None
    reward_low: float | None = None
    reward_high: float | None = None

    @property
    def column(self) -> tuple[str, float]:
        """Where the cell stands in the table."""
        return self.split, self.temperature


@dataclass(frozen=True, slots=True)
class Level:
    """An accuracy, or a mean reward (``by_reward``), with its 95% interval."""

    by_reward: bool
    value: float | None
    low: float | None
    high: float | None

    @property
    def shown(self) -> str:
        """The value: an accuracy in per cent, a mean reward as it is."""
        return "–" if self.value is None else self._shown(self.value)

    @property
    def interval(self) -> str | None:
        """Both ends of the interval."""
        return None if self.low is None or self.high is None else f"{self._shown(self.low)} to {self._shown(self.high)}"

    def _shown(self, value: float) -> str:
        return f"{value:.3f}" if self.by_reward else f"{100 * value:.1f}"


@dataclass(frozen=True, slots=True)
class StageMetrics:
    """The measured steps of one training stage, in order, one a step number."""

    stage: str
    kind: str
    steps: tuple[Mapping[str, Any], ...]
    best_step: int | None = None
    """The step whose model the stage left; None: its last one, or it has not ended."""

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Step numbers and finite values of one quantity."""
        points = [(number(step.get("step")), number(step.get(key))) for step in self.steps]
        kept = [(x, y) for x, y in points if x is not None and y is not None]
        return [x for x, _ in kept], [y for _, y in kept]

    def total(self, key: str) -> float | None:
        """Sum over the steps; None when no step has it."""
        values = self.series(key)[1]
        return sum(values) if values else None


@dataclass(frozen=True, slots=True)
class RunFiles:
    """Everything the reports read."""

    folder: Path
    recipe: Mapping[str, Any]
    recipe_text: str
    environment: Mapping[str, Any]
    training: tuple[StageMetrics, ...]
    cells: tuple[Measurement, ...]
    stages: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def subjects(self) -> list[str]:
        """Models that were measured, in the order of the run."""
        return list(dict.fromkeys(cell.subject for cell in self.cells))

    @property
    def columns(self) -> list[tuple[str, float]]:
        """Split and temperature of every column, in the order in which they were measured."""
        return list(dict.fromkeys(cell.column for cell in self.cells))

    def cell(self, subject: str, column: tuple[str, float]) -> Measurement | None:
        """The last measurement of a model in a column."""
        found = [cell for cell in self.cells if cell.subject == subject and cell.column == column]
        return found[-1] if found else None

    def by_reward(self, column: tuple[str, float]) -> bool:
        """Whether a column shows mean rewards: a cell of it has no accuracy."""
        return any(cell.accuracy is None for cell in self.cells if cell.column == column)

    def level(self, cell: Measurement) -> Level:
        """What the table shows for a cell, the same measure in a whole column."""
        if self.by_reward(cell.column):
            return Level(True, cell.reward, cell.reward_low, cell.reward_high)
        return Level(False, cell.accuracy, cell.low, cell.high)

    @property
    def pending(self) -> list[str]:
        """Stages of the recipe that have left nothing yet."""
        seen = {cell.stage for cell in self.cells} | {training.stage for training in self.training}
        return [stage for stage in self.stages if stage not in seen]


def evaluation_of(run: Path, stage: str | None = None) -> Path:
    """The folder of the evaluation that a stage of a run keeps; default: the last one that has been evaluated.

    Raises:
        UserError: there is none, or none of this stage; it names those that there are.
    """
    stages = [name for name in load_recipe(run / "recipe.toml").stages if kind_of(name) == "eval"]
    kept = [name for name in stages if (run / "stages" / name / EVALUATION).is_dir()]
    if (wanted := stage or (kept[-1] if kept else None)) in kept:
        return run / "stages" / str(wanted) / EVALUATION
    raise UserError(
        f"stage {stage!r} of this run has no evaluation" if stage else "this run has no evaluation yet",
        remedy=f"give one of: {', '.join(f'{run}:{name}' for name in kept)}" if kept else "run an eval stage first",
        file=run,
    )


def read_run(folder: Path) -> RunFiles:
    """Read a run's folder.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"no run folder {str(folder)!r}", remedy="give the folder that a run wrote", file=folder)
    notes: list[str] = []
    text = _text(folder / "recipe.toml")
    recipe: dict[str, Any] = {}
    try:
        recipe = read_own_toml(folder / "recipe.toml", remedy="") if (folder / "recipe.toml").exists() else {}
    except DamagedFile as error:
        notes.append(f"recipe.toml cannot be read: {error.problem}")
    named = recipe.get("stages", [])
    stages = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    lines = _lines(folder / "metrics.jsonl", notes)
    notes += [
        _said(change) for change in read_lines(folder / "changes.jsonl").values if change.get("field") != "folder"
    ]
    found = sorted(path.name for path in (folder / "stages").glob("*") if path.is_dir())
    stages += [name for name in found if name not in stages]
    return RunFiles(
        folder=folder,
        recipe=recipe,
        recipe_text=text,
        environment=_json(folder / "environment.json", notes),
        training=_training(lines, stages, folder, notes),
        cells=tuple(_cells(folder, stages, notes)),
        stages=tuple(stages),
        notes=tuple(notes),
    )


def _said(change: Mapping[str, Any]) -> str:
    """A line of the history of a run's settings."""
    after = f" after step {change['after_step']}" if change.get("after_step") else ""
    return f"{change.get('field')} was {change.get('before')!r}, and is {change.get('now')!r}{after}"


def _lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The readable lines of a file; notes say which could not be read, or were set aside when the run was resumed."""
    found = read_lines(path)
    if cut := len(found.bad) + bool(found.torn):
        where = f" (line {found.bad[0].number}: {found.bad[0].why})" if found.bad else ""
        notes.append(f"{path.name}: {cut} unreadable line{'s' if cut > 1 else ''} left out{where}")
    aside = damaged_lines(path)
    if aside.is_file():
        with aside.open("rb") as file:
            count = sum(1 for _ in file)
        notes.append(f"{path.name}: {count} damaged line{'s' if count > 1 else ''} set aside in {aside.name}")
    return found.values


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def subject_of(stage: str, stages: list[str]) -> str:
    """The model that an evaluation measures: the training stage before it, or the base."""
    before = stages[: stages.index(stage)] if stage in stages else []
    trained = [name for name in before if kind_of(name) in KINDS and kind_of(name) != "eval"]
    return trained[-1] if trained else "base"


def _training(
    lines: list[dict[str, Any]], stages: list[str], folder: Path, notes: list[str]
) -> tuple[StageMetrics, ...]:
    """A resumed run measures some steps twice: the later line counts, for it belongs to the weights that are there."""
    by_stage: dict[str, dict[float, dict[str, Any]]] = {}
    for line in lines:
        stage, step = line.get("stage"), number(line.get("step"))
        if isinstance(stage, str) and step is not None:
            by_stage.setdefault(stage, {})[step] = line
    order = sorted(by_stage, key=lambda name: stages.index(name) if name in stages else len(stages))
    found = []
    for stage in order:
        steps = [by_stage[stage][step] for step in sorted(by_stage[stage])]
        kind = next((str(step["kind"]) for step in steps if step.get("kind")), kind_of(stage))
        best = number(_json(folder / "stages" / stage / "done.json", notes).get("best_step"))
        found.append(StageMetrics(stage, kind, tuple(steps), None if best is None else int(best)))
    return tuple(found)


def _cells(folder: Path, stages: list[str], notes: list[str]) -> Iterator[Measurement]:
    for stage in stages:
        path = folder / "stages" / stage / "result.json"
        if not path.is_file():
            continue
        rows = _json(path, notes).get("rows") or []
        for row in rows if isinstance(rows, list) else [rows]:
            accuracy = number(row.get("accuracy")) if isinstance(row, dict) else None
            reward = number(row.get("reward")) if isinstance(row, dict) else None
            degrees = isinstance(row, dict) and bool(number(row.get("graded")))
            if accuracy is None and not degrees:
                notes.append(f"{stage}: a row of result.json has no accuracy")
                continue
            counts = {key: number(row.get(key)) for key in _COUNTS}
            yield Measurement(
                subject=subject_of(stage, stages),
                stage=stage,
                split=str(row.get("split", "test")),
                temperature=number(row.get("temperature")) or 0.0,
                accuracy=accuracy,
                low=number(row.get("low")),
                high=number(row.get("high")),
                mean_tokens=number(row.get("mean_tokens")),
                reward=reward,
                reward_low=number(row.get("reward_low")),
                reward_high=number(row.get("reward_high")),
                **{key: None if value is None else int(value) for key, value in counts.items()},
            )


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_json(path, remedy="put a whole copy of it back")
    except DamagedFile as error:
        notes.append(f"{path.parent.name}/{path.name} cannot be read: {first_line(error).removeprefix(f'{path}')}")
        return {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

"""What another process can see of a run: where it is, its curves, its last sample, whether it is alive."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from thence.errors import UserError
from thence.files import read_json
from thence.locks import is_held
from thence.pipeline.progress import PROGRESS
from thence.pipeline.run_files import StageMetrics, number, read_run
from thence.pipeline.time_left import Remaining
from thence.redaction import redacted

State = Literal["done", "running", "stopped", "unclear"]
_TAIL = 1 << 20
"""Bytes at the end of a file of samples in which the last one is looked for."""
_WINDOW = 20
"""Steps over which the speed of a stage is measured."""


@dataclass(frozen=True)
class Seen:
    """A run at one moment.

    Args:
        name: the run's.
        folder: the run's.
        stages: of the recipe, in order.
        done: those that have ended.
        state: done; running; stopped, that is no process runs it and stages are left; unclear where the file system has
            no locks and stages are left.
        step: steps of the present stage that have been taken.
        total: steps of the present stage; None where that is not known.
        seconds: left of the present stage; None where that is not known.
        whole: left of the whole run, as far as it is known.
        doing: what goes on before the first step, in words; "" otherwise.
        metrics: of the last stage that trained; None before.
        sample: the last response that was graded, a line of ``samples.jsonl`` with its stage; None before.
    """

    name: str
    folder: Path
    stages: tuple[str, ...]
    done: tuple[str, ...]
    state: State
    step: int
    total: int | None
    seconds: float | None
    whole: Remaining
    doing: str
    metrics: StageMetrics | None
    sample: Mapping[str, Any] | None

    @property
    def stage(self) -> str | None:
        """The stage that runs, or would be next; None where all are done."""
        return next((name for name in self.stages if name not in self.done), None)


def look(folder: Path) -> Seen:
    """Look at a run. Nothing is written, and what cannot be read yet is left out.

    Raises:
        UserError: there is no such folder.
    """
    held = is_held(folder)  # before the files: a run that ends in between has left all of them
    run = read_run(folder)
    listed = run.recipe.get("stages")
    stages = tuple(name for name in run.stages if not isinstance(listed, list) or name in listed)
    done = tuple(name for name in stages if (folder / "stages" / name / "done.json").is_file())
    present = next((name for name in stages if name not in done), None)
    progress = _progress(folder, present)
    metrics = next((stage for stage in run.training if stage.stage == present), None)
    taken = metrics.series("step")[1] if metrics else []
    step = int(number(progress.get("done")) or (taken[-1] if taken else 0))
    total = number(progress.get("total")) or _of_recipe(run.recipe, present)
    doing = progress.get("doing")
    return Seen(
        name=str(run.recipe.get("name") or folder.name),
        folder=folder,
        stages=stages,
        done=done,
        state="done" if stages and present is None else "unclear" if held is None else "running" if held else "stopped",
        step=step,
        total=None if total is None else int(total),
        seconds=_seconds_left(metrics, step, total),
        whole=_whole(progress),
        doing=redacted(doing) if isinstance(doing, str) else "",
        metrics=metrics or (run.training[-1] if run.training else None),
        sample=_last_sample(folder, stages),
    )


def _progress(folder: Path, stage: str | None) -> Mapping[str, Any]:
    """What the run says of its present stage; empty where it says nothing."""
    if not (folder / PROGRESS).is_file():
        return {}
    try:
        found = read_json(folder / PROGRESS, remedy="")
    except (UserError, OSError):
        return {}
    if not isinstance(found, dict):
        return {}
    return found if found.get("stage") == stage else {key: found.get(key) for key in ("doing", "left", "at")}


def _whole(progress: Mapping[str, Any]) -> Remaining:
    """What the run said of the time that it has to go, less the time since."""
    left, at = progress.get("left"), number(progress.get("at"))
    seconds = number(left.get("seconds")) if isinstance(left, Mapping) else None
    if not isinstance(left, Mapping) or seconds is None or at is None:
        return Remaining(None, None)
    unknown = left.get("unknown")
    names = tuple(map(redacted, filter(_is_text, unknown))) if isinstance(unknown, list) else ()
    return Remaining(None, max(0.0, seconds - max(0.0, time.time() - at)), names)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _of_recipe(recipe: Mapping[str, Any], stage: str | None) -> float | None:
    table = recipe.get(stage) if stage else None
    return number(table.get("steps")) if isinstance(table, Mapping) else None


def _seconds_left(metrics: StageMetrics | None, step: int, total: float | None) -> float | None:
    seconds = metrics.series("seconds")[1][-_WINDOW:] if metrics else []
    if not seconds or total is None:
        return None
    return max(0.0, total - step) * sum(seconds) / len(seconds)


def _last_sample(folder: Path, stages: tuple[str, ...]) -> Mapping[str, Any] | None:
    """The last whole line of the newest file of samples that was graded."""
    files = [path for name in stages if (path := folder / "stages" / name / "samples.jsonl").is_file()]
    for file in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            opened.seek(max(0, size - _TAIL))
            lines = opened.read().split(b"\n")
        for line in reversed(lines[0 if size <= _TAIL else 1 : -1]):
            row = _row(line)
            if row is not None:
                return row | {"stage": file.parent.name}
    return None


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("verdict"), str) else None

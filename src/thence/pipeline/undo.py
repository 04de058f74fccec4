"""What a stage of a run has left is put out of the way: set aside whole, reopened, or cut after a step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thence.jsonl import read_jsonl, repair_lines, write_jsonl
from thence.pipeline.owned import SET_ASIDE
from thence.wording import json_kind

log = logging.getLogger(__name__)


def set_stage_aside(run: Path, stage: str, why: str) -> None:
    """Move what a stage has left out of the way, with its lines of metrics. Nothing is removed.

    Args:
        run: the run's folder.
        why: for the log.
    """
    place, metrics = run / "stages" / stage, run / "metrics.jsonl"
    if not place.is_dir():
        return
    lines = [line for line in read_jsonl(metrics) if line.get("stage") == stage] if metrics.exists() else []
    if lines:
        write_jsonl(place / "metrics.jsonl", lines)
    aside = _aside(run, stage)
    place.rename(aside)
    log.warning("stage %s: %s; what it had left is in %s", stage, why, aside)


def reopen(run: Path, stage: str) -> None:
    """Reopen a finished stage, to resume from its last checkpoint. The published model is set aside."""
    place, aside = run / "stages" / stage, _aside(run, stage)
    aside.mkdir()
    (place / "done.json").rename(aside / "done.json")
    (place / "model").rename(aside / "model")
    if (place / "adapter").exists():
        (place / "adapter").rename(aside / "adapter")
    log.warning("stage %s is continued from its last checkpoint; the model that it had left is in %s", stage, aside)


def rewind(run: Path, stage: str, step: int) -> None:
    """Drop what a stage logged after ``step`` (it will be written again), and a line cut off by a crash.

    Lines that cannot be read are set aside in ``NAME.damaged`` and named in the log.
    """
    for path in (run / "metrics.jsonl", run / "stages" / stage / "samples.jsonl"):
        if path.exists():
            repair_lines(path, wrong_with_line)
            kept = [line for line in read_jsonl(path) if line["stage"] != stage or line["step"] <= step]
            write_jsonl(path, kept)


def _aside(run: Path, stage: str) -> Path:
    """A free place for what a stage has left."""
    place, number = run / SET_ASIDE, 1
    while (place / f"{stage}-{number}").exists():
        number += 1
    place.mkdir(exist_ok=True)
    return place / f"{stage}-{number}"


def wrong_with_line(line: Mapping[str, Any]) -> str | None:
    """What a line of ``metrics.jsonl`` or of a stage's ``samples.jsonl`` lacks; None: nothing."""
    for name, kind in (("stage", str), ("step", int)):
        if name not in line:
            return f"it lacks {name}"
        if not isinstance(line[name], kind) or isinstance(line[name], bool):
            return f"{name} is {json_kind(line[name])}"
    return None

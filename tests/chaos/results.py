"""What a command leaves that must not depend on whether it was killed: weights bit by bit, numbers without times."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

PATTERNS = (
    "**/stages/*/model/*.safetensors",
    "**/metrics.jsonl",
    "**/stages/*/samples.jsonl",
    "**/stages/*/result.json",
    "samples/*.jsonl",
    "grades/*.jsonl",
    "results.json",
    "results.csv",
)
TIMES = ("tokens_per_s", "environment", "folder", "started", "finished", "command", "done_at", "date", "regrade")


def results_of(folder: Path) -> dict[str, Any]:
    """File by file: a digest of weights, the content of numbers without times, both without the order of samples."""
    found = {path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return {str(path.relative_to(folder)): _content(path) for path in sorted(found)}


def differences(undisturbed: dict[str, Any], killed: dict[str, Any]) -> list[str]:
    """The files in which two results differ, each with how."""
    names = sorted(undisturbed.keys() | killed.keys())
    told = []
    for name in names:
        if name not in killed or name not in undisturbed:
            told.append(f"{name}: {'missing' if name not in killed else 'too much'}")
        elif undisturbed[name] != killed[name]:
            told.append(f"{name}: differs")
    return told


def left_over(folder: Path) -> list[str]:
    """Temporary files that a finished command should have removed, and checkpoints beside the last one."""
    checkpoints = [sorted(p.glob("step-*")) for p in folder.rglob("checkpoints")]
    found = [p for steps in checkpoints for p in steps[:-1]]
    found += [p for p in folder.rglob("*") if p.name.startswith(".") and is_temporary(p)]
    return sorted(str(path.relative_to(folder)) for path in found)


def is_temporary(path: Path) -> bool:
    """Whether a dotted name is that of a file or folder that is being written."""
    return "writing" in path.name or path.name.startswith(".replaced")


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if path.suffix == ".csv":
        return path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return timeless(json.loads(path.read_text(encoding="utf-8")))
    lines = [timeless(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    # an evaluation appends what comes first; a run's metrics and samples have an order
    ordered = path.parent.name in ("samples", "grades")
    return sorted(lines, key=lambda line: json.dumps(line, sort_keys=True)) if ordered else lines


def timeless(value: Any) -> Any:
    """A plain value without what is measured by a clock or names the folder (as the command that grades again does)."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMES and not k.endswith("seconds")}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value

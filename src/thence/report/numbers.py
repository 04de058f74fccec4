"""The numbers of a report as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict, fields
from typing import Any

from thence.report.outcome import outcome
from thence.report.run_files import Cell, RunFiles, Training

_TOTALS = ("tokens", "trained_tokens", "flops", "seconds")


def report_json(run: RunFiles) -> str:
    """Everything on the page that is a number: results, totals and the steps of every stage."""
    content = {
        "outcome": outcome(run),
        "name": run.recipe.get("name"),
        "seed": run.recipe.get("seed"),
        "environment": dict(run.environment),
        "results": [asdict(cell) for cell in run.cells],
        "training": [{**totals(stage), "curve": list(stage.steps)} for stage in run.training],
        "pending": run.pending,
        "notes": list(run.notes),
    }
    return json.dumps(_finite(content), indent=1, ensure_ascii=True) + "\n"


def report_csv(run: RunFiles) -> str:
    """The table of results, a line a cell. Shares are between 0 and 1."""
    buffer = io.StringIO()
    names = [field.name for field in fields(Cell)]
    writer = csv.DictWriter(buffer, ["name", "seed", *names], lineterminator="\n")
    writer.writeheader()
    for cell in run.cells:
        row = {"name": run.recipe.get("name"), "seed": run.recipe.get("seed"), **asdict(cell)}
        writer.writerow({key: _plain_text(value) for key, value in row.items()})
    return buffer.getvalue()


def totals(stage: Training) -> dict[str, Any]:
    """Steps, tokens, FLOPs and seconds of a training stage, summed over its steps."""
    return {"stage": stage.stage, "kind": stage.kind, "steps": len(stage.steps)} | {
        key: stage.total(key) for key in _TOTALS
    }


def _plain_text(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula is quoted."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _finite(value: Any) -> Any:
    """NaN and infinity are not JSON: null instead."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value

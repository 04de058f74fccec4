"""The numbers of a run as JSON and CSV."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from thence.files import to_csv, to_json
from thence.pages.run.leaving import held_out_regimes
from thence.pages.run.outcome import outcome
from thence.pipeline.run_files import Measurement, RunFiles, StageMetrics

_TOTALS = ("tokens", "trained_tokens", "flops", "seconds")


def report_json(run: RunFiles) -> str:
    """Everything on the page that is a number: results, totals and the steps of every stage."""
    content = {
        "outcome": outcome(run),
        "name": run.recipe.get("name"),
        "seed": run.recipe.get("seed"),
        "environment": dict(run.environment),
        "results": [asdict(cell) for cell in run.cells],
        "training": [{**totals(stage), **_regimes(stage), "curve": list(stage.steps)} for stage in run.training],
        "pending": run.pending,
        "notes": list(run.notes),
    }
    return to_json(content, indent=1) + "\n"


def report_csv(run: RunFiles) -> str:
    """The table of results, a line a cell. Shares are between 0 and 1."""
    own = {"name": run.recipe.get("name"), "seed": run.recipe.get("seed")}
    return to_csv(
        [*own, *(field.name for field in fields(Measurement))], ({**own, **asdict(cell)} for cell in run.cells)
    )


def _regimes(stage: StageMetrics) -> dict[str, Any]:
    """The step whose model was left and the regimes of the held-out loss, where they are known."""
    best = {} if stage.best_step is None else {"best_step": stage.best_step}
    found = [asdict(measured) for measured in held_out_regimes(stage)]
    return best | ({"held_out_regimes": found} if found else {})


def totals(stage: StageMetrics) -> dict[str, Any]:
    """Steps, tokens, FLOPs and seconds of a training stage, summed over its steps."""
    return {"stage": stage.stage, "kind": stage.kind, "steps": len(stage.steps)} | {
        key: stage.total(key) for key in _TOTALS
    }

"""The report of a run: one HTML page that needs nothing else, and the same numbers as JSON and CSV."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from thence.redaction import redacted, redacted_values
from thence.report.curves import curves
from thence.report.numbers import report_csv, report_json, totals
from thence.report.outcome import outcome
from thence.report.run_files import Cell, RunFiles, Training, read_run
from thence.report.samples import pick_samples, visible
from thence.toml import to_toml
from thence.wording import duration

_LABELS = {
    "thence": "thence",
    "git_commit": "git commit",
    "python": "Python",
    "torch": "torch",
    "transformers": "transformers",
    "platform": "platform",
    "cpu": "CPU",
    "threads": "threads",
    "device": "device",
    "started": "started",
}


def write_report(run_folder: Path) -> Path:
    """Write ``report.html``, ``report.json`` and ``report.csv`` into a run's folder, finished or not.

    Returns:
        The path of the page.

    Raises:
        UserError: there is no such folder.
    """
    run = _without_secrets(read_run(run_folder))
    page = run_folder / "report.html"
    for path, text in (
        (run_folder / "report.json", report_json(run)),
        (run_folder / "report.csv", report_csv(run)),
        (page, _render(run)),
    ):
        _replace(path, text)
    return page


def _without_secrets(run: RunFiles) -> RunFiles:
    """A run as its page may show it: an older version kept recipe and command as they were."""
    return replace(
        run,
        recipe=redacted_values(run.recipe),
        recipe_text=redacted(run.recipe_text),
        environment=redacted_values(run.environment),
        notes=tuple(redacted(note) for note in run.notes),
    )


def _render(run: RunFiles) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((resources.files("thence.report") / "page.html").read_text(encoding="utf-8"))
    return template.render(
        title=visible(str(run.recipe.get("name") or run.folder.name)),
        description=visible(str(run.recipe.get("description") or "")),
        seed=run.recipe.get("seed"),
        outcome=visible(outcome(run)),
        pending=[visible(stage) for stage in run.pending],
        notes=[visible(note) for note in run.notes],
        columns=[(visible(split), f"{temperature:g}") for split, temperature in run.columns],
        unit=_unit(run),
        by_reward=[run.by_reward(column) for column in run.columns],
        rows=[(visible(subject), [_cell(run, subject, column) for column in run.columns]) for subject in run.subjects],
        details=[_detail(run, cell) for cell in run.cells],
        degrees=any(cell.graded for cell in run.cells),
        stages=[_stage(training, _labels(run)) for training in run.training],
        samples={visible(stage): kept for stage, kept in pick_samples(run.folder, run.stages).items()},
        recipe=visible(run.recipe_text or to_toml(run.recipe)),
        environment=[(label, visible(str(run.environment[key]))) for key, label in _LABELS.items() if _has(run, key)],
        command=visible(_command(run)),
    )


def _cell(run: RunFiles, subject: str, column: tuple[str, float]) -> dict[str, Any] | None:
    cell = run.cell(subject, column)
    return None if cell is None else _detail(run, cell)


def _unit(run: RunFiles) -> str:
    by_reward = {run.by_reward(column) for column in run.columns}
    return {True: "Mean reward", False: "Accuracy, %"}[by_reward.pop()] if len(by_reward) == 1 else "Accuracy, %"


def _detail(run: RunFiles, cell: Cell) -> dict[str, Any]:
    level = run.level(cell)
    return {
        "subject": visible(cell.subject),
        "stage": visible(cell.stage),
        "split": visible(cell.split),
        "temperature": f"{cell.temperature:g}",
        "level": level.shown,
        "half": level.half,
        "interval": level.interval,
        "graded": _count(cell.graded),
        "reward": "–" if cell.reward is None else f"{cell.reward:.3f}",
        "n": _count(cell.problems) + (f" × {cell.samples:,}" if (cell.samples or 1) > 1 else ""),
        "right": _count(cell.right),
        "wrong": _count(cell.wrong),
        "unknown": _count(cell.unknown),
        "mean_tokens": "–" if cell.mean_tokens is None else f"{cell.mean_tokens:,.1f}",
        "truncated": _count(cell.truncated),
    }


def _labels(run: RunFiles) -> dict[str, str]:
    """What the run calls the method of each stage."""
    labels = run.environment.get("methods")
    return {str(k): str(v) for k, v in labels.items()} if isinstance(labels, Mapping) else {}


def _stage(training: Training, methods: Mapping[str, str]) -> dict[str, Any]:
    sums = totals(training)
    facts = [methods[training.stage]] if training.stage in methods else []
    facts += [f"{sums['steps']:,} step{'' if sums['steps'] == 1 else 's'}"]
    if sums["trained_tokens"] is not None:
        facts.append(f"{sums['trained_tokens']:,.0f} trained tokens")
    if sums["flops"] is not None:
        facts.append(f"{sums['flops']:.3g} FLOPs")
    if sums["seconds"] is not None:
        facts.append(duration(sums["seconds"]))
    return {
        "name": visible(training.stage),
        "kind": training.kind,
        "facts": visible(", ".join(facts)),
        "curves": curves(training),
    }


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _has(run: RunFiles, key: str) -> bool:
    return run.environment.get(key) not in (None, "")


def _command(run: RunFiles) -> str:
    command = run.environment.get("command")
    if isinstance(command, list):
        command = " ".join(str(part) for part in command)
    return str(command or f"thence run {run.folder / 'recipe.toml'}")


def _replace(path: Path, text: str) -> None:
    """Write beside and rename, so that a reader never sees half a report."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text.encode("utf-8", "replace").decode("utf-8"), encoding="utf-8")
    os.replace(beside, path)  # noqa: PTH105

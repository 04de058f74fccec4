"""The page of a run, and the same numbers as JSON and CSV."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from thence.files import write_atomically
from thence.jsonl import stream_lines
from thence.pages.environment import environment_facts
from thence.pages.figure import Figure
from thence.pages.run.curves import curves, smoothing_note
from thence.pages.run.leaving import leaving_table
from thence.pages.run.numbers import report_csv, report_json, totals
from thence.pages.run.outcome import outcome
from thence.pages.run.tables import results_table, verdicts_table
from thence.pages.samples import (
    ENDS,
    ShownSample,
    excerpt,
    first_of_each,
    hold,
    judged_only,
    reward_components,
    shown_turns,
    weighed_tokens,
)
from thence.pages.template import render
from thence.pipeline.run_files import RunFiles, StageMetrics, number, read_run
from thence.redaction import redacted, redacted_values
from thence.toml import to_toml
from thence.wording import duration

_FINISH = {"stop": "stopped by itself", "length": "cut off at the limit", **ENDS}
_SEARCHED = 20_000
"""Lines of a file that are searched for the first of each verdict."""


def write_page(run_folder: Path) -> Path:
    """Write ``report.html``, ``report.json`` and ``report.csv`` into a run's folder, finished or not.

    Returns:
        The path of the page.

    Raises:
        UserError: there is no such folder.
    """
    run = read_shown(run_folder)
    page = run_folder / "report.html"
    for path, text in (
        (run_folder / "report.json", report_json(run)),
        (run_folder / "report.csv", report_csv(run)),
        (page, render_page(run)),
    ):
        write_atomically(path, text)
    return page


def current_page(run_folder: Path) -> str:
    """The page of a run as it is now; nothing is written. Raises UserError where there is no such folder."""
    return render_page(read_shown(run_folder))


def read_shown(folder: Path) -> RunFiles:
    """A run as a page may show it, without secrets: an older version kept recipe and command as they were.

    Raises:
        UserError: there is no such folder.
    """
    run = read_run(folder)
    return replace(
        run,
        recipe=redacted_values(run.recipe),
        recipe_text=redacted(run.recipe_text),
        environment=redacted_values(run.environment),
        notes=tuple(redacted(note) for note in run.notes),
    )


def render_page(run: RunFiles) -> str:
    """The page as HTML."""
    seed = run.recipe.get("seed")
    unfinished = [f"Unfinished: nothing yet from {', '.join(run.pending)}."] if run.pending else []
    samples = [(stage, _samples(run.folder, stage)) for stage in run.stages]
    return render(
        "run",
        title=str(run.recipe.get("name") or run.folder.name),
        aside="" if seed is None else f"seed {seed}",
        description=str(run.recipe.get("description") or ""),
        outcome=outcome(run),
        notes=[*unfinished, *run.notes],
        results=results_table(run, whole=True),
        verdicts=verdicts_table(run),
        stages=[_stage(training, run) for training in run.training],
        samples=[(stage, kept) for stage, kept in samples if kept],
        held=hold((stage, shown_samples(run.folder, stage)) for stage in run.stages),
        recipe=run.recipe_text or to_toml(run.recipe),
        environment=environment_facts(run.environment),
        command=_command(run),
    )


def _labels(run: RunFiles) -> dict[str, str]:
    """What the run calls the method of each stage."""
    labels = run.environment.get("methods")
    return {str(k): str(v) for k, v in labels.items()} if isinstance(labels, Mapping) else {}


def _stage(training: StageMetrics, run: RunFiles) -> dict[str, Any]:
    sums, methods, table = totals(training), _labels(run), run.recipe.get(training.stage)
    facts = [methods[training.stage]] if training.stage in methods else []
    facts += [f"{sums['steps']:,} step{'' if sums['steps'] == 1 else 's'}"]
    if sums["trained_tokens"] is not None:
        facts.append(f"{sums['trained_tokens']:,.0f} trained tokens")
    if sums["flops"] is not None:
        facts.append(f"{sums['flops']:.3g} FLOPs")
    if sums["seconds"] is not None:
        facts.append(duration(sums["seconds"]))
    if unused := training.total("unused_tokens"):
        facts.append(f"{unused:,.0f} tokens sampled that no batch holds")
    if training.steps and (wasted := number(training.steps[-1].get("wasted_tokens"))):
        facts.append(f"{wasted:,.0f} tokens sampled and never trained")
    ended = (run.folder / "stages" / training.stage / "done.json").is_file()
    return {
        "name": training.stage,
        "facts": ", ".join(facts),
        "figure": _figure(training),
        "leaving": leaving_table(training, table if isinstance(table, Mapping) else {}, ended),
    }


def _command(run: RunFiles) -> str:
    command = run.environment.get("command")
    if isinstance(command, list):
        command = " ".join(str(part) for part in command)
    return str(command or f"thence run {run.folder / 'recipe.toml'}")


def _figure(training: StageMetrics) -> Figure:
    note = smoothing_note(len(training.steps))
    return Figure(training.stage, tuple(curves(training)), notes=(note,) if note else ())


def shown_samples(folder: Path, stage: str, before: str = "") -> Iterator[Callable[[], ShownSample]]:
    """The graded samples of a stage, in order, each made when it is called.

    Args:
        before: what the names of their groups begin with.
    """
    return judged_only(_graded(folder, stage, before))


def _samples(folder: Path, stage: str) -> list[ShownSample]:
    return first_of_each(islice(_graded(folder, stage), _SEARCHED))


def _graded(folder: Path, stage: str, before: str = "") -> Iterator[tuple[Any, Callable[[], ShownSample]]]:
    """Verdict of every readable line of a stage's samples, and how to make its sample."""
    for line in stream_lines(folder / "stages" / stage / "samples.jsonl"):
        row = line[1] if isinstance(line, tuple) else {}
        yield row.get("verdict"), partial(_sample, before + stage, row)


def _sample(source: str, row: Mapping[str, Any]) -> ShownSample:
    where = [str(row["split"])] if row.get("split") is not None else []
    where += [f"T = {row['temperature']:g}"] if isinstance(row.get("temperature"), (int, float)) else []
    group = ", ".join([source, *where])
    where += [f"problem {row['index']}"] if row.get("index") is not None else []
    where += [f"step {row['step']}"] if row.get("step") else []
    finish = f", {_FINISH.get(str(row['finish']), row['finish'])}" if row.get("finish") else ""
    length, step = number(row.get("tokens")), number(row.get("step"))
    score = number(row.get("score"))
    return ShownSample(
        verdict=row["verdict"],
        prompt=excerpt(row.get("prompt")),
        response=excerpt(row.get("response")),
        answer=excerpt(row.get("answer")),
        extracted=excerpt(row.get("extracted")),
        reason=excerpt(row.get("reason")),
        where=", ".join(where),
        score=f"{score:.4g}" if row["verdict"] == "graded" and score is not None else "",
        tokens=f"{row['tokens']} tokens{finish}" if row.get("tokens") is not None else "",
        group=group,
        reward=score,
        length=None if length is None else int(length),
        step=int(step) if step else None,
        components=reward_components(row.get("components")),
        weighed=weighed_tokens(row.get("weighed")),
        turns=shown_turns(row.get("turns")),
    )

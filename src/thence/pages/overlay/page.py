"""The page of several runs: results side by side, curves laid over each other, the settings in which they differ."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from thence.files import write_atomically
from thence.pages.figure import Figure, Key
from thence.pages.overlay.tables import Named, cost_of_all, results_of_all, settings_apart
from thence.pages.run.curves import overlaid, smoothing_note
from thence.pages.run.page import read_shown, shown_samples
from thence.pages.samples import ShownSample, hold, slug
from thence.pages.template import render


def named_runs(folders: Sequence[Path]) -> Named:
    """The runs by the shortest name that tells them apart: the folder's, or with the folders above it.

    Raises:
        UserError: there is no such folder.
    """
    whole = [folder.resolve() for folder in folders]
    deepest = max(len(folder.parts) for folder in whole)
    names = [folder.name for folder in whole]
    for depth in range(2, deepest + 1):
        if len(set(names)) == len(names):
            break
        names = ["/".join(folder.parts[-depth:]) for folder in whole]
    return {name: read_shown(folder) for name, folder in zip(names, folders, strict=True)}


def page_of(folders: Sequence[Path]) -> Path:
    """Where the page of these runs is written by default: in the folder that holds all of them."""
    above = Path(os.path.commonpath([folder.resolve().parent for folder in folders]))
    names = "-".join(slug(folder.resolve().name) for folder in folders)
    return above / f"report-{names[:120]}.html"


def write_page(folders: Sequence[Path], path: Path, command: str) -> Path:
    """Write the page of several runs and return its path.

    Args:
        folders: of the runs, finished or not.
        path: the file to write.
        command: what writes it again.

    Raises:
        UserError: there is no such folder.
    """
    write_atomically(path, render_page(named_runs(folders), command))
    return path


def render_page(runs: Named, command: str) -> str:
    """The page as HTML."""
    keys = {name: Key.of(name, index) for index, name in enumerate(runs)}
    return render(
        "overlay",
        title=", ".join(runs),
        notes=[f"{name}: {note}" for name, run in runs.items() for note in (*_unfinished(run.pending), *run.notes)],
        results=results_of_all(runs, whole=True),
        cost=cost_of_all(runs),
        apart=settings_apart(runs),
        stages=_stages(runs, keys),
        held=hold(_samples(runs)),
        command=command,
    )


def _unfinished(pending: Sequence[str]) -> list[str]:
    return [f"unfinished, nothing yet from {', '.join(pending)}"] if pending else []


def _samples(runs: Named) -> Iterator[tuple[str, Iterator[Callable[[], ShownSample]]]]:
    for name, run in runs.items():
        for stage in run.stages:
            yield f"{name}-{stage}", shown_samples(run.folder, stage, f"{name}: ")


def _stages(runs: Named, keys: dict[str, Key]) -> list[Figure]:
    """A figure a stage: its curves in all runs that have it."""
    found: list[Figure] = []
    for stage in dict.fromkeys(training.stage for run in runs.values() for training in run.training):
        held = {name: training for name, run in runs.items() for training in run.training if training.stage == stage}
        note = smoothing_note(max(len(training.steps) for training in held.values()))
        shown = tuple(keys[name] for name in held)
        found.append(Figure(stage, tuple(overlaid(held, keys)), shown, (note,) if note else ()))
    return found

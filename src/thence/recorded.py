"""Runs from Python: run one as the command does, open one, and read what it recorded as tables."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from thence.errors import UserError
from thence.jsonl import read_lines
from thence.pages.run.page import write_page
from thence.pipeline.panel import RunDisplay
from thence.pipeline.run_files import Measurement, read_run
from thence.recipe import Recipe
from thence.terminal import logging_to, make_console
from thence.train.parallel import rank_variable
from thence.train.run_marker import is_run

if TYPE_CHECKING:
    from pandas import DataFrame

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordedRun:
    """A run in its folder, finished or not. Every property reads the files of now.

    The tables are pandas data frames. They need the package pandas: ``pip install "thence[pandas]"``.
    """

    folder: Path

    @property
    def metrics(self) -> DataFrame:
        """One row for each optimizer step, in order; a column for each quantity of ``metrics.jsonl``.

        Where a resumed run measured a step twice, the later measurement counts. Raises UserError without pandas.
        """
        rows = [dict(step) for stage in read_run(self.folder).training for step in stage.steps]
        return _table(rows, ["stage", "step"])

    @property
    def samples(self) -> DataFrame:
        """One row for each graded response, of training and evaluation; the column ``stage`` names its stage.

        Lines that cannot be read are left out. Raises UserError without pandas.
        """
        rows: list[dict[str, Any]] = []
        for stage in read_run(self.folder).stages:
            lines = read_lines(self.folder / "stages" / stage / "samples.jsonl").values
            rows += [{"stage": stage, **line} for line in lines]
        return _table(rows, ["stage", "prompt", "response", "verdict", "score"])

    @property
    def results(self) -> DataFrame:
        """One row for each measurement: model, split, temperature, accuracy (0 to 1) and its 95% interval.

        Raises UserError without pandas.
        """
        columns = [field.name for field in fields(Measurement)]
        return _table([asdict(cell) for cell in read_run(self.folder).cells], columns)

    @property
    def report(self) -> Path:
        """The path of the page. It is written first where it is not there, or older than what it shows.

        Raises:
            UserError: the run folder is gone.
        """
        page = self.folder / "report.html"
        if page.is_file():
            own = [self.folder / name for name in ("recipe.toml", "environment.json", "metrics.jsonl")]
            shown = [*own, *self.folder.glob("stages/*/*.json*")]
            if all(file.stat().st_mtime_ns <= page.stat().st_mtime_ns for file in shown if file.is_file()):
                return page
        return write_page(self.folder)


def run(
    recipe: Recipe | str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    progress: bool = True,
    restart: bool = False,
    repeat: Sequence[str] = (),
) -> RecordedRun:
    """Run a recipe, or resume it where it stopped, and write its page, as the command ``thence run`` does.

    Args:
        recipe: a shipped recipe, a TOML file, a mapping, or a :class:`thence.Recipe`.
        overrides: dotted names to values, laid over it: ``{"sft.lr": 2e-5}``.
        progress: show what happens, on standard output.
        restart: remove what an earlier run wrote into the folder, and start again.
        repeat: stages to set aside and run again.

    Raises:
        UserError: something that the user can fix; what was written before stands.
    """
    from thence.pipeline.run import run as run_stages

    with _quiet_transformers():
        if progress:
            with shown_on(make_console()) as watcher:
                folder = run_stages(recipe, overrides, watcher=watcher, restart=restart, repeat=repeat)
        else:
            folder = run_stages(recipe, overrides, restart=restart, repeat=repeat)
    if rank_variable("RANK") == 0:
        try:
            write_page(folder)
        except ImportError as error:  # the run is done, and stands
            log.warning("the page was not written: %s cannot be imported", error.name)
    return RecordedRun(folder)


@contextmanager
def shown_on(console: Console) -> Iterator[RunDisplay]:
    """Shows the progress and the log of a run on a console; ranks after the first show errors alone."""
    level = logging.INFO if rank_variable("RANK") == 0 else logging.ERROR
    with logging_to(console, level), RunDisplay(console) as watcher:
        yield watcher


def load_run(folder: str | Path) -> RecordedRun:
    """Open a run by its folder, or by its name under ``runs/``.

    Raises:
        UserError: there is none.
    """
    for place in (Path(folder).expanduser(), Path("runs") / folder):
        if is_run(place) or (place / "recipe.toml").is_file():
            return RecordedRun(place)
    raise UserError(f"no run at {folder}", remedy="give the folder that a run wrote", file=folder)


def _table(rows: list[dict[str, Any]], columns: Sequence[str]) -> DataFrame:
    """A data frame of rows; ``columns`` are those of one without rows."""
    try:
        import pandas
    except ImportError:
        raise UserError(
            "the tables of a run are pandas data frames, and pandas cannot be imported",
            remedy='pip install "thence[pandas]"; or read metrics.jsonl and stages/*/samples.jsonl',
        ) from None
    return pandas.DataFrame(rows or None, columns=None if rows else list(columns))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """transformers' own bars and warnings would break the bar of a run; afterwards they are as they were."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()

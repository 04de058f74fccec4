"""Trackers: metrics sent to TensorBoard, trackio or Weights & Biases beside the run's own files.

A tracker never stops a run: what it raises is logged once, and it is told nothing more. Only the first rank has any.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import math
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from thence.errors import RecipeError, first_line
from thence.files import to_json, write_atomically
from thence.pipeline.owned import TRACKERS, kept_values
from thence.pipeline.progress import RunWatcher
from thence.recipe import Recipe
from thence.redaction import redacted

if TYPE_CHECKING:
    from thence.pipeline.foreseen import Foreseen

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes the numbers of a run."""

    def begin(self, stage: str, done: int) -> None:
        """A stage begins, or is resumed after ``done`` steps: what is known of later ones will be sent again."""
        ...

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a step of a stage, or, with step 0, the result of an evaluation."""
        ...

    def close(self) -> None:
        """The run ends or stops."""
        ...


class TensorBoard:
    """Event files in ``tensorboard/<stage>`` of the run folder: ``tensorboard --logdir RUN/tensorboard``."""

    def __init__(self, folder: Path, recipe: Recipe):
        from torch.utils.tensorboard import SummaryWriter

        self._open: Callable[..., Any] = SummaryWriter
        self.folder, self.writers = folder / "tensorboard", dict[str, Any]()

    def begin(self, stage: str, done: int) -> None:
        # steps that will be measured again are hidden by TensorBoard
        purge = done + 1 if done else None
        self.writers[stage] = self._open(str(self.folder / stage), purge_step=purge)

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writers[stage].add_scalar(name, value, step)
        self.writers[stage].flush()

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


class WeightsAndBiases:
    """A run of wandb; a resumed run is the same one there. ``WANDB_MODE``, ``WANDB_DIR`` and others hold as usual.

    wandb is not asked for the command line, the code or the machine: a command may hold secrets.
    """

    def __init__(self, folder: Path, recipe: Recipe):
        import wandb

        # wandb puts hooks of its own here for the whole process, and then says how a command of ours has ended
        ours = sys.exit, sys.excepthook
        settings = wandb.Settings(
            console="off", disable_code=True, disable_git=True, x_disable_meta=True, init_timeout=60, login_timeout=10
        )
        self.run = wandb.init(
            project=recipe.trackers.project,
            name=folder.name,
            id=_kept_id(folder, "wandb"),
            resume="allow",
            config=kept_values(recipe),
            settings=settings,
        )
        sys.exit, sys.excepthook = ours

    def begin(self, stage: str, done: int) -> None:
        # a stage has steps of its own
        self.run.define_metric(f"{stage}/step")
        self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self.run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in values.items()}})

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of trackio, in its own database on this machine: ``trackio show``. A resumed run is the same one there.

    trackio is not asked for the load of the machine.
    """

    def __init__(self, folder: Path, recipe: Recipe):
        with redirect_stdout(io.StringIO()):  # what it prints would break the bar of a run
            import trackio

            self.finish = trackio.finish
            self.run = trackio.init(
                project=recipe.trackers.project,
                name=f"{folder.name}-{_kept_id(folder, 'trackio')}",  # trackio knows a run by its name
                resume="allow",
                config=kept_values(recipe),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def begin(self, stage: str, done: int) -> None:
        pass

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self.run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in values.items()}})

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self.finish()


KNOWN: dict[str, tuple[str, Callable[[Path, Recipe], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "trackio": ("trackio", Trackio),
    "wandb": ("wandb", WeightsAndBiases),
}
"""Name in the recipe -> the package that it needs, and what opens it."""


class Tracking:
    """A watcher that hands on what it is told, and sends the numbers to the trackers."""

    def __init__(self, watcher: RunWatcher, folder: Path, recipe: Recipe):
        self.watcher, self.open = watcher, dict[str, Tracker]()
        for name in dict.fromkeys(recipe.trackers.to):
            self._guarded(name, lambda name=name: self.open.update({name: KNOWN[name][1](folder, recipe)}))

    def begin(self, name: str, stages: Sequence[str]) -> None:
        self.watcher.begin(name, stages)

    def planned(self, foreseen: Foreseen) -> None:
        self.watcher.planned(foreseen)

    def doing(self, what: str) -> None:
        self.watcher.doing(what)

    def stage(self, name: str, total: int, done: int) -> None:
        self.watcher.stage(name, total, done)
        self._all(lambda tracker: tracker.begin(name, done))

    def step(self, facts: Mapping[str, Any]) -> None:
        self.watcher.step(facts)
        stage, step = facts.get("stage"), facts.get("step")
        if isinstance(stage, str) and isinstance(step, int):
            self._all(lambda tracker: tracker.log(stage, step, numbers_of(facts)))

    def results(self, stage: str, file: Path) -> None:
        """What an evaluation measured: the rows of its ``result.json``."""
        self._all(lambda tracker: tracker.log(stage, 0, _measured(file)))

    def close(self) -> None:
        self._all(lambda tracker: tracker.close())

    def _all(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.open.items()):
            self._guarded(name, lambda tracker=tracker: act(tracker))

    def _guarded(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever it is, the run is worth more
            self.open.pop(name, None)
            said = redacted(first_line(error))
            log.warning("the tracker %s failed and is told nothing more; the run continues: %s", name, said)


def numbers_of(facts: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line, tables in it as ``table/name``; its step is left out."""
    found = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": number for inner, number in numbers_of(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and name != "step":
            found[name] = value
    return found


def _measured(file: Path) -> dict[str, float]:
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    found = {}
    for row in rows:
        cell = f"{row['split']}/T={row['temperature']:g}"
        found |= {f"{cell}/{name}": value for name, value in numbers_of(row).items() if name != "temperature"}
    return found


@contextmanager
def tracked(recipe: Recipe, folder: Path, watcher: RunWatcher, leads: bool) -> Iterator[RunWatcher]:
    """The watcher of a run, with its trackers where there are any and this process is the first rank."""
    if not recipe.trackers.to or not leads:
        yield watcher
        return
    tracking = Tracking(watcher, folder, recipe)
    try:
        yield tracking
    finally:
        tracking.close()


def check_trackers(recipe: Recipe) -> None:
    """Raise RecipeError if the package of a tracker is not installed."""
    for name in recipe.trackers.to:
        package, _ = KNOWN[name]
        if importlib.util.find_spec(package) is None:
            raise RecipeError(
                f"the package {package} is not installed",
                remedy='pip install "thence[trackers]", or leave the tracker out',
                field="trackers.to",
            )


def _kept_id(folder: Path, tracker: str) -> str:
    """What tells the run from others at its tracker, the same whenever it is resumed."""
    file, kept = folder / TRACKERS, {}
    with suppress(OSError, ValueError):
        found = json.loads(file.read_text())
        kept = found if isinstance(found, dict) else {}
    if not isinstance(kept.get(tracker), str):
        kept[tracker] = uuid.uuid4().hex[:12]
        write_atomically(file, to_json(kept) + "\n")
    return kept[tracker]

"""The run folder: everything a run keeps, and how it survives being killed at any moment."""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from thence import __version__
from thence.errors import UserError
from thence.files import is_environment, read_json, to_json, write_atomically
from thence.jsonl import append_jsonl
from thence.locks import held, refuse_if_held
from thence.pipeline.changes import Resumption, State, judge, say_onward
from thence.pipeline.numerics import numerics
from thence.pipeline.owned import (
    CHANGES,
    RECIPE,
    clear,
    is_beginning,
    kept_values,
    new_marker,
    read_marker,
    recipe_is_own,
    recipe_of,
    recipe_text,
    refuse_foreign,
    refuse_unwritable,
    survey,
    write_where_other,
)
from thence.pipeline.undo import reopen, set_stage_aside
from thence.recipe import Recipe, kind_of, load_recipe
from thence.redaction import as_typed, redacted_command
from thence.train.checkpoint import checkpoints

log = logging.getLogger(__name__)
DOING = "runs this recipe"
LOCK_SECONDS = 2.0  # for a process that is just ending


class RunFolder:
    """Paths and files of one run.

    Layout: ``.thence-run.json`` (the marker), ``.lock``, ``recipe.toml`` (resolved), ``changes.jsonl`` (what of it has
    changed since), ``environment.json``, ``ground.json`` (the model's files), ``metrics.jsonl`` (one line a step),
    ``report.html``, and for each stage ``stages/<name>/`` with ``ground.json`` (what it reads) and ``checkpoints/``
    while it runs, then ``model/`` (Hugging Face layout; beside it ``adapter/`` where adapters were trained) or
    ``result.json`` and ``samples.jsonl``, both made from the store ``evaluation/`` (:mod:`thence.evaluate.store`), and,
    last of all, ``done.json``. The last checkpoint of the last training stage stays, so that it can be given more
    steps. What a repeated or continued stage had left is in ``set-aside/<name>-<number>/``.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metrics = path / "metrics.jsonl"

    def stage(self, name: str) -> Path:
        """The folder of one stage."""
        return self.path / "stages" / name

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run, so that no other process writes into it. Raises UserError where one does, and says which."""
        with held(self.path, DOING, wait=LOCK_SECONDS):
            yield

    def refuse_if_held(self) -> None:
        """Raise UserError if another process runs this run now; nothing is written."""
        refuse_if_held(self.path, DOING, wait=LOCK_SECONDS)

    def open(
        self,
        recipe: Recipe,
        device: str,
        methods: Mapping[str, str] | None = None,
        ranks: int = 1,
        *,
        restart: bool = False,
        repeat: Sequence[str] = (),
    ) -> Resumption:
        """Make the folder, or take up the run that stands in it, with the changes that its recipe has.

        Args:
            methods: what each stage's method is called in reports.
            ranks: processes that share each step.
            restart: remove what thence wrote of the run before.
            repeat: stages to set aside and run again.

        Returns:
            What became of the stages that were there.

        Raises:
            UserError: as :meth:`check`.
        """
        plan = self.check(recipe, restart, repeat)
        marker = read_marker(self.path) if self.path.is_dir() else None
        if marker is not None and (restart or marker.restarting):
            clear(self.path, marker)
            marker = None
        for name in plan.repeat:
            set_stage_aside(self.path, name, "it is repeated")
        for name in plan.extend:
            reopen(self.path, name)
        if marker is not None:
            self._record_changes(plan, recipe)
        (new_marker(recipe) if marker is None else marker.with_recipe(recipe)).write(self.path)
        if marker is None or marker.recipe_digests or not (self.path / RECIPE).exists():
            write_where_other(self.path / RECIPE, recipe_text(recipe))
        self._record_start(environment(device, ranks) | ({"methods": dict(methods)} if methods else {}))
        return plan

    def check(self, recipe: Recipe, restart: bool = False, repeat: Sequence[str] = ()) -> Resumption:
        """What becomes of the run that stands in the folder. Nothing is written.

        Args:
            restart: what thence wrote of it will be removed, under any settings.
            repeat: stages to be run again.

        Raises:
            UserError: the folder is not writable, or not thence's; it holds other things, or a link in the place of a
                file; the run has settings that may not change.
        """
        refuse_unwritable(self.path)
        if not self.path.is_dir():
            return Resumption()
        marker = read_marker(self.path)
        if marker is None:
            refuse_foreign(self.path, tuple(p for p in sorted(self.path.iterdir()) if not is_beginning(p)), None)
            return Resumption()
        found = survey(self.path, marker)
        if found.links:
            raise UserError(
                "a link stands where the run keeps a file or folder of its own",
                remedy="put what it points to in its place: thence follows no link out of the folder of a run",
                file=found.links[0],
            )
        if restart or marker.restarting:
            refuse_foreign(self.path, found.foreign, marker)
            return Resumption()
        self.first_start()
        if unknown := [name for name in repeat if name not in recipe.stages]:
            raise UserError(
                f"there is no stage {unknown[0]!r} to repeat",
                remedy=f"give one of: {', '.join(recipe.stages)}",
                field="--repeat",
            )
        if marker.recipe_digests and not recipe_is_own(self.path, marker):
            raise UserError(
                "thence keeps the settings of the run here, and this file is not as thence wrote it",
                remedy="move it elsewhere: thence writes its own again; if you have edited it, give the moved one as "
                f"RECIPE with --folder {self.path}",
                file=self.path / RECIPE,
            )
        before = recipe_of(self.path, marker)
        return judge(
            before, load_recipe(kept_values(recipe)), self.states(before), self._steps(before), self.path, repeat
        )

    @property
    def restarting(self) -> bool:
        """Whether a --restart was killed while it removed the run before; the next start completes it."""
        marker = read_marker(self.path) if self.path.is_dir() else None
        return marker is not None and marker.restarting

    def states(self, recipe: Recipe) -> dict[str, State]:
        """How far every stage of the recipe that the run has is."""
        last = last_trained(recipe)
        found: dict[str, State] = {}
        for name in recipe.stages:
            place = self.stage(name)
            if self.is_done(name):
                found[name] = "kept" if name == last and checkpoints(place / "checkpoints") else "done"
            else:
                found[name] = "begun" if place.is_dir() and any(place.iterdir()) else "new"
        return found

    def _steps(self, recipe: Recipe) -> dict[str, int]:
        names = {name: checkpoints(self.stage(name) / "checkpoints") for name in recipe.stages}
        numbers = {name: found[-1].name.removeprefix("step-") for name, found in names.items() if found}
        return {name: int(number) for name, number in numbers.items() if number.isdigit()}

    def _record_changes(self, plan: Resumption, recipe: Recipe) -> None:
        """Add what has changed to the history of the run, and to the log where a stage has begun."""
        steps, states = self._steps(recipe), self.states(recipe)
        for change in plan.changes:
            follows = say_onward(change, recipe)
            after = steps.get(change.stage or "", 0)
            line = {
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "thence": __version__,
                "field": change.field,
                "before": change.before,
                "now": change.now,
                "after_step": after if change.stage and states.get(change.stage) != "new" else None,
                "follows": follows,
            }
            append_jsonl(self.path / CHANGES, [line])
            if change.rule.key in ("onward", "length") and after:
                log.warning("%s, after step %d: %s", change, after, follows)

    def _record_start(self, facts: dict[str, Any]) -> None:
        """Keep the environment of the first start, and of later ones beside it."""
        if first := self.first_start():
            facts = {**first, "later_starts": [*first.get("later_starts", []), facts]}
        write_atomically(self.path / "environment.json", to_json(facts, indent=1))

    def first_start(self) -> dict[str, Any]:
        """The environment of the first start; nothing before it. Raises DamagedFile."""
        file = self.path / "environment.json"
        if not file.exists():
            return {}
        remedy = (
            "put a whole copy of it back; or rename it, and the run is resumed with a new one, which does not know the "
            "first start"
        )
        return read_json(file, remedy=remedy, shape=is_environment)

    def is_done(self, stage: str) -> bool:
        """Whether the stage is complete. Raises DamagedFile where it cannot be told."""
        return (self.stage(stage) / "done.json").exists() and self.facts(stage) is not None

    def finish(self, stage: str, facts: Mapping[str, Any]) -> None:
        """Mark the stage complete."""
        write_atomically(self.stage(stage) / "done.json", to_json(facts))

    def facts(self, stage: str) -> dict[str, Any]:
        """What a complete stage left in ``done.json``; nothing of one that is not. Raises DamagedFile."""
        file = self.stage(stage) / "done.json"
        if not file.exists():
            return {}
        remedy = f"put a whole copy of it back; or rename it, and the same command runs stage {stage} again"
        return read_json(file, remedy=remedy, shape=_is_facts)

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line of metrics."""
        append_jsonl(self.metrics, [line])


def _is_facts(facts: Mapping[str, Any]) -> bool:
    """Whether a value is what a stage leaves in ``done.json``: at least one count."""
    counts = [facts[name] for name in ("steps", "measurements") if name in facts]
    return bool(counts) and all(isinstance(n, int) for n in counts) and isinstance(facts.get("model", ""), str | None)


def environment(device: str, ranks: int | None = None) -> dict[str, Any]:
    """What a number of this run depends on besides its recipe, and the files that it reads."""
    import transformers

    return {
        "thence": __version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        **numerics(),
        "device": device,
        **({"ranks": ranks} if ranks is not None else {}),
        "command": redacted_command(as_typed(sys.argv)),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def git_commit() -> str | None:
    """The commit of thence's source tree, with ``+changes`` if it has uncommitted ones; None outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None or git("ls-files", "--error-unmatch", str(Path(__file__))) is None:
        return None
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def last_trained(recipe: Recipe) -> str | None:
    """The last stage that trains; None where none does."""
    return next((name for name in reversed(recipe.stages) if kind_of(name) != "eval"), None)

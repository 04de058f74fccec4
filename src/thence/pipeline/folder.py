"""The run folder: everything a run keeps, and how it survives being killed at any moment."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from thence import __version__
from thence.errors import DamagedFile, UserError
from thence.files import (
    fitted,
    is_environment,
    read_json,
    read_jsonl,
    read_toml,
    repair_lines,
    to_json,
    write_atomically,
    write_jsonl,
)
from thence.recipe import Recipe, load_recipe
from thence.toml import to_toml


class RunFolder:
    """Paths and files of one run.

    Layout: ``recipe.toml`` (resolved), ``environment.json``, ``ground.json`` (the model's files), ``metrics.jsonl``
    (one line a step), ``report.html``, and for each stage ``stages/<name>/`` with ``ground.json`` (what it reads) and
    ``checkpoints/`` while it runs, then ``model/`` (Hugging Face layout) or ``result.json``, ``samples.jsonl`` and,
    last of all, ``done.json``.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metrics = path / "metrics.jsonl"

    def stage(self, name: str) -> Path:
        """The folder of one stage."""
        return self.path / "stages" / name

    def open(self, recipe: Recipe, device: str, methods: Mapping[str, str] | None = None, ranks: int = 1) -> None:
        """Make the folder, or take up the run that stands in it.

        Args:
            methods: what each stage's method is called in reports.
            ranks: processes that share each step.

        Raises:
            UserError: the folder holds a run of another recipe.
        """
        self.check(recipe)
        if not (self.path / "recipe.toml").exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / "recipe.toml", to_toml(recipe.resolved()))
        self._record_start(environment(device, ranks) | ({"methods": dict(methods)} if methods else {}))

    def check(self, recipe: Recipe, restart: bool = False) -> None:
        """Raise UserError if the run cannot be written here: it is of another recipe, or the folder is not writable.

        Args:
            restart: the run that stands in it will be thrown away, whatever its settings.
        """
        kept = self.path / "recipe.toml"
        # compare as recipes: the text of an older version may differ where the settings do not
        if not restart:
            self.first_start()
        if not restart and kept.exists() and not self._kept_recipe().same_as(recipe):
            raise UserError(
                f"{self.path} holds a run with other settings",
                remedy="give another --folder (or --name), or --restart to begin anew and lose that run",
                file=kept,
            )
        place = self.path.absolute()
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise UserError(
                f"the run folder {self.path} cannot be written: {place} is not a folder that you may write to",
                remedy="give another --folder",
                field="folder",
            )

    def remove(self) -> None:
        """Throw the run away. Raises UserError where the folder holds something that is no run."""
        if not self.path.exists():
            return
        if any(self.path.iterdir()) and not (self.path / "recipe.toml").exists():
            raise UserError("the folder holds no run", remedy="give another --folder, or empty it", file=self.path)
        shutil.rmtree(self.path)

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

    def _kept_recipe(self) -> Recipe:
        """The recipe that the run was begun with. Raises DamagedFile."""
        file = self.path / "recipe.toml"
        remedy = "put a whole copy of it back, or give another --folder; what the run has written stays as it is"
        fitted(file, read_toml(file, remedy=remedy), lambda tables: tables["stages"], remedy)
        try:
            return load_recipe(file)
        except UserError as error:
            raise DamagedFile(error.problem, remedy=remedy, file=file, line=error.line, field=error.field) from None

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
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(to_json(line) + "\n")

    def rewind(self, stage: str, step: int) -> None:
        """Drop what this stage logged after ``step`` (it will be written again), and a line cut off by a crash.

        Lines that cannot be read are set aside in ``NAME.damaged`` and named in the log.
        """
        for path in (self.metrics, self.stage(stage) / "samples.jsonl"):
            if path.exists():
                repair_lines(path, wrong_with_line)
                kept = [line for line in read_jsonl(path) if line["stage"] != stage or line["step"] <= step]
                write_jsonl(path, kept)


def wrong_with_line(line: Mapping[str, Any]) -> str | None:
    """What a line of ``metrics.jsonl`` or of a stage's ``samples.jsonl`` lacks; None: nothing."""
    for name, kind in (("stage", str), ("step", int)):
        if name not in line:
            return f"it lacks {name}"
        if not isinstance(line[name], kind) or isinstance(line[name], bool):
            return f"{name} is {type(line[name]).__name__}"
    return None


def _is_facts(facts: Mapping[str, Any]) -> bool:
    """Whether a value is what a stage leaves in ``done.json``: at least one count."""
    counts = [facts[name] for name in ("steps", "measurements") if name in facts]
    return bool(counts) and all(isinstance(n, int) for n in counts) and isinstance(facts.get("model", ""), str | None)


def environment(device: str, ranks: int | None = None) -> dict[str, Any]:
    """What a number of this run depends on besides its recipe, and the files that it reads."""
    import torch
    import transformers

    return {
        "thence": __version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "device": device,
        **({"ranks": ranks} if ranks is not None else {}),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
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


def cpu_name() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()

"""The ground that a run stands on: the files that its stages were begun with, and whether they are still the same.

A stage writes down the state of everything that it reads when it begins (``ground.json``). A run that is resumed on
other data, another model, another reward or another template would be a mixture of two runs, so it is refused; that is
also true of what a finished stage has read. What may differ in the last bits only, such as versions, is said.
"""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from thence.data.trajectory import Prompt
from thence.errors import UserError
from thence.files import read_json, to_json, write_atomically
from thence.pipeline.folder import RunFolder, environment
from thence.pipeline.owned import RECIPE
from thence.pipeline.rewards import reward_names
from thence.pipeline.test_sets import test_sets
from thence.pipeline.undo import set_stage_aside
from thence.recipe import Eval, Model, Recipe, Rl, kind_of
from thence.train.checkpoint import MANIFEST
from thence.train.model_files import OF_A_MODEL, OF_A_TOKENIZER, resolve
from thence.train.written import check_written
from thence.verify.loading import function_file

log = logging.getLogger(__name__)
FILE = "ground.json"
WHOLE = 64 * 2**20  # bytes; of a larger file of weights, samples stand for the whole
SAMPLES, SAMPLE = 256, 64 * 2**10
ENVIRONMENT = (
    *("thence", "git_commit", "torch", "transformers", "cpu", "instructions", "threads", "kernels"),
    *("device", "ranks"),
)

State = dict[str, Any]
"""What is kept of a file: ``digest``, ``bytes`` and ``modified``."""


def ground_of(recipe: Recipe, name: str) -> dict[str, State]:
    """The state of every file that a stage reads besides the model that the stage before it left.

    Files are named as the recipe names them; a folder or a model stands for the files in it that matter. What is not a
    file of this machine, such as a data set on the hub, is not in it: see :func:`rows_digest`.
    """
    stage = recipe.stage(name)
    tables = list(test_sets(stage).values()) if isinstance(stage, Eval) else [stage.data]
    named: list[str] = []
    for table in tables:
        data = recipe.stage_data(table)
        named += [*data.source, *([data.template] if data.template not in ("own", "none") else [])]
    if isinstance(stage, Rl | Eval):
        named += [file for spec in reward_names(stage) for file in _reward_file(spec)]
    return _states(named)


def model_ground(settings: Model) -> dict[str, State]:
    """The state of the files of the model that the first stage starts from, and of its tokenizer."""
    found: dict[str, State] = {}
    for name, patterns in ((settings.path, (*OF_A_MODEL, *OF_A_TOKENIZER)), (settings.tokenizer, OF_A_TOKENIZER)):
        folder = Path(resolve(name)) if name else None
        if folder is not None and folder.is_dir():
            files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
            found |= {str(file): state_of(file, sampled=True) for file in sorted(files)}
    return found


def rows_digest(prompts: Iterable[Prompt]) -> str:
    """16 hex digits that follow from rendered rows: tokens, answers, and their order."""
    digest = hashlib.sha256()
    for p in prompts:
        shown = p.demonstration_ids
        digest.update(f"{len(p.token_ids)},{None if shown is None else len(shown)},{p.answer!r};".encode())
        digest.update(array("q", p.token_ids).tobytes() + array("q", shown or ()).tobytes())
    return digest.hexdigest()[:16]


def _columns_digest(prompts: Iterable[Prompt]) -> str:
    """16 hex digits that follow from what else the rows hold; empty: nothing."""
    columns = [prompt.columns for prompt in prompts]
    return hashlib.sha256("\n".join(columns).encode("utf-8", "surrogatepass")).hexdigest()[:16] if any(columns) else ""


def state_of(file: Path, *, sampled: bool = False) -> State:
    """Digest, size and time of the last change of a file. ``sampled``: of a large one, evenly spread parts."""
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as content:
        if not sampled or size <= WHOLE:
            digest = hashlib.file_digest(content, "sha256")
        else:
            for i in range(SAMPLES):
                content.seek(i * (size - SAMPLE) // (SAMPLES - 1))
                digest.update(content.read(SAMPLE))
    modified = datetime.fromtimestamp(file.stat().st_mtime, UTC).isoformat(timespec="seconds")
    return {"digest": digest.hexdigest()[:16], "bytes": size, "modified": modified}


def published(model: Path) -> str | None:
    """16 hex digits that follow from every file of a published model."""
    manifest = model / MANIFEST
    return state_of(manifest)["digest"] if manifest.is_file() else None


class Ground:
    """The ground of a run, kept in its folder.

    Args:
        recipe, folder: of the run.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder):
        self.recipe, self.folder = recipe, folder

    def check(self, again: Collection[str] = ()) -> None:
        """Compare what every begun stage has read with what is there now. Raises UserError where it differs.

        A file of a finished stage that is gone is nothing to worry about; it is said in the log. A file that lies
        elsewhere, with the same content, is the same file.

        Args:
            again: stages that are done and will be run all the same: what they had read does not matter any more.
        """
        begun = [name for name in self.recipe.stages if self._kept(self.folder.stage(name)) is not None]
        begun = [name for name in begun if name not in again]
        kept = self._kept(self.folder.path)
        if kept is not None and begun:
            left = any(not self.folder.is_done(name) for name in self.recipe.stages)
            self._compare(kept["files"], model_ground(self.recipe.model), "the run", not left, None)
        for name in begun:
            before, done = self._kept(self.folder.stage(name)), self.folder.is_done(name)
            assert before is not None
            only = name if isinstance(self.recipe.stage(name), Eval) else None
            then, now = before["files"], ground_of(self.recipe, name)
            if before.get("reward_failed") and not done:
                stage = self.recipe.stage(name)
                own = reward_names(stage) if isinstance(stage, Rl | Eval) else {}
                reward = [file for spec in own for file in _reward_file(spec)]
                then, now = ({k: v for k, v in files.items() if k not in reward} for files in (then, now))
            self._compare(then, now, f"stage {name}", done, only)
        self._check_start(again)

    def begin(self, name: str, prompts: Mapping[str, Sequence[Prompt]]) -> None:
        """Write down the ground of a stage that begins. One that was begun before must have the same rows.

        Args:
            prompts: the stage's rendered data tables, by name.

        Raises:
            UserError: the rows are not those that the stage began with.
        """
        rows, stage = {table: rows_digest(found) for table, found in prompts.items()}, self.recipe.stage(name)
        if isinstance(stage, Rl | Eval) and any(":" in spec for spec in reward_names(stage)):  # which may read them
            others = {table: _columns_digest(found) for table, found in prompts.items()}
            rows |= {f"{table} with their other columns": digest for table, digest in others.items() if digest}
        kept = self._kept(self.folder.stage(name))
        if kept is None:
            if self._kept(self.folder.path) is None:
                self._write(self.folder.path, {"files": model_ground(self.recipe.model)})
            facts = {"files": ground_of(self.recipe, name), "rows": rows, "start": self._start(name)}
            self._write(self.folder.stage(name), facts)
            return
        now = ground_of(self.recipe, name)
        if kept.pop("reward_failed", False):
            if now != kept["files"]:
                log.warning("stage %s is resumed with another reward function, since the one before failed", name)
            self._write(self.folder.stage(name), {**kept, "files": now})
        for table, digest in rows.items():
            if kept.get("rows", {}).get(table, digest) != digest:
                raise UserError(
                    f"the rows of {table} are not those that stage {name} began with: as rendered they had the digest "
                    f"{kept['rows'][table]}, now {digest}; the data set, the tokenizer or thence has changed",
                    remedy=self._remedy(None),
                    file=self.folder.stage(name),
                )
        if kept["files"] != now:  # they have been moved
            self._write(self.folder.stage(name), {**kept, "files": now})

    def set_outdated_aside(self, name: str) -> None:
        """Set a stage aside that has begun from another model than the one that the stage before it has left now."""
        kept = self._kept(self.folder.stage(name))
        if kept is not None and "start" in kept and kept["start"] != self._start(name):
            set_stage_aside(self.folder.path, name, "the stage before it was repeated and has left another model")

    def _before(self, name: str) -> str | None:
        """The stage whose model a stage starts from; None: the recipe's model."""
        before = self.recipe.stages[: self.recipe.stages.index(name)]
        return next((other for other in reversed(before) if kind_of(other) != "eval"), None)

    def _start(self, name: str) -> str | None:
        """What the model is known by that a stage starts from; None: it is the recipe's."""
        before = self._before(name)
        return None if before is None else self.folder.facts(before).get("model")

    def reward_failed(self, name: str) -> None:
        """Note that a stage ended because its reward function failed: it may be fixed, and the stage resumed."""
        kept = self._kept(self.folder.stage(name))
        if kept is not None:
            self._write(self.folder.stage(name), {**kept, "reward_failed": True})

    def _check_start(self, again: Collection[str]) -> None:
        """Whether the model that the next stage starts from is the one that the stage before it left."""
        following = next((n for n in self.recipe.stages if n in again or not self.folder.is_done(n)), None)
        before = None if following is None else self._before(following)
        if before is not None and before not in again:
            check_written(self.folder.stage(before) / "model")

    def _compare(
        self, before: Mapping[str, State], now: Mapping[str, State], owner: str, done: bool, only: str | None
    ) -> None:
        of_model = only is None and owner == "the run"  # the names of a model's files matter, those of data do not
        if _contents(before, of_model) == _contents(now, of_model):
            return  # the same files, here or elsewhere
        for file, state in before.items():
            found = now.get(file)
            if found is None and done:
                log.warning("%s has read %s, which is no longer there", owner, file)
            elif found is None or (found["digest"], found["bytes"]) != (state["digest"], state["bytes"]):
                has = "has read" if done else "was begun with"
                raise UserError(
                    f"the file is not the one that {owner} {has}: then {said(state)}, now {said(found)}",
                    remedy=self._remedy(only),
                    file=file,
                )
        for file in now.keys() - before.keys():
            raise UserError(
                f"the file was not there when {owner} was begun: now {said(now[file])}",
                remedy=self._remedy(only),
                file=file,
            )

    def _remedy(self, only: str | None) -> str:
        place = self.folder.path
        command = f"thence run {place / RECIPE} --folder {place} --repeat {only}"
        repeated = f"to repeat this evaluation alone: {command}; or " if only is not None else ""
        return f"put the file back; {repeated or 'or '}give another --folder"

    def _kept(self, place: Path) -> dict[str, Any] | None:
        file = place / FILE
        remedy = (
            "put a whole copy of it back; or rename it, and the run is resumed without comparing the files that this "
            "part of it was begun with"
        )
        return read_json(file, remedy=remedy, shape=_is_ground) if file.exists() else None

    def _write(self, place: Path, facts: Mapping[str, Any]) -> None:
        place.mkdir(parents=True, exist_ok=True)
        write_atomically(place / FILE, to_json(facts, indent=1))


def say_what_differs(folder: RunFolder, device: str, ranks: int) -> None:
    """Log what of versions, threads and ranks differs from the run's first start: its last bits may follow from it."""
    before, now = folder.first_start(), environment(device, ranks)
    changed = [f"{key} {before[key]} -> {now[key]}" for key in ENVIRONMENT if key in before and before[key] != now[key]]
    if changed:
        log.warning("the run began with another environment (%s); numbers may differ slightly", ", ".join(changed))


def kept_states(run: Path) -> Iterator[tuple[str, State, bool]]:
    """Every file that a run in this folder has read, its state then, and whether that is of samples of a large file.

    Raises:
        DamagedFile: what the run kept cannot be read.
    """
    for file in (run / FILE, *sorted((run / "stages").glob(f"*/{FILE}"))):
        if file.exists():
            facts = read_json(
                file, remedy=f"put a whole copy of it back; or remove {run}: the run is repeated", shape=_is_ground
            )
            yield from ((name, state, file.parent == run) for name, state in facts["files"].items())


def _is_ground(facts: Mapping[str, Any]) -> bool:
    """Whether a value is what :meth:`Ground.begin` writes."""
    states = facts["files"].values()
    known = all(isinstance(s["digest"], str) and isinstance(s["bytes"], int) and s["modified"] for s in states)
    return known and isinstance(facts.get("rows", {}), dict)


def _states(names: Iterable[str]) -> dict[str, State]:
    found: dict[str, State] = {}
    for name in names:
        path = Path(name).expanduser()
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        found |= {str(file): state_of(file) for file in files if file.is_file()}
    return found


def _reward_file(reward: str) -> list[str]:
    """The file of a reward function of the user's own."""
    file = function_file(reward)
    return [] if file is None else [str(file)]


def said(state: State | None) -> str:
    """A file's state in words."""
    if state is None:
        return "it is not there"
    return f"{state['bytes']:,} bytes, digest {state['digest']}, changed {state['modified']}"


def _contents(files: Mapping[str, State], named: bool) -> list[tuple[str, str, int]]:
    """What files hold, in any folder, with their names in it or without."""
    return sorted((Path(file).name if named else "", state["digest"], state["bytes"]) for file, state in files.items())

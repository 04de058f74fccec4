"""What in a run folder is thence's own: it has a marker, and thence knows the names that it writes.

Nothing else is ever removed or written over. A link is never thence's, so nothing is followed out of the folder.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from thence import __version__
from thence.errors import UserError
from thence.files import read_json, to_json, write_atomically
from thence.locks import LOCK
from thence.pipeline.progress import PROGRESS
from thence.recipe import Recipe, load_recipe
from thence.redaction import redacted_values
from thence.toml import to_toml
from thence.train.checkpoint import REPLACED, WRITING, written_names
from thence.train.run_marker import MARKER, is_run
from thence.train.run_models import EXPORTED

FORMAT = 1
RECIPE, ENVIRONMENT, CHANGES = "recipe.toml", "environment.json", "changes.jsonl"
SET_ASIDE = "set-aside"
SHOWN = 3  # things of others that an error names
_OF_RUN = {RECIPE, ENVIRONMENT, CHANGES, "ground.json", "metrics.jsonl", "summary.json", MARKER, LOCK}
_OF_RUN |= {"report.html", "report.json", "report.csv", PROGRESS, "plan.json"}
_OF_STAGE = {"ground.json", "result.json", "samples.jsonl", "done.json", "metrics.jsonl"}
TRACKERS = "trackers.json"
"""The name of the run at a tracker, so that a resumed run stays the same one there."""
_OF_RUN |= {TRACKERS}
EVALUATION = "evaluation"
"""The store in the folder of an evaluation stage."""
_OF_EVALUATION = {"evaluation.toml", ENVIRONMENT, "problems.json", LOCK, "report.html", "results.json", "results.csv"}
_DATED = re.compile(r"results_.+\.json|samples_.+\.jsonl")
_PART = re.compile(r".+-[\d.e+-]+\.jsonl?")  # of an evaluation by an older version
_BESIDE = re.compile(r"\.(?P<hidden>.+)\.(?:writing|new)|(?P<kept>.+)\.damaged(?:-\d+)?")


@dataclass(frozen=True)
class Marker:
    """The file by which a folder is known as a run.

    Args:
        recipe: the resolved settings, as plain values.
        recipe_digests: of every ``recipe.toml`` that thence has written here; none: that file is not thence's.
        stages: every stage that the run has had.
        restarting: what was there before is being removed.
    """

    recipe: Mapping[str, Any]
    recipe_digests: tuple[str, ...]
    stages: tuple[str, ...]
    restarting: bool = False

    def write(self, folder: Path) -> None:
        """Write it, atomically."""
        facts = {"format": FORMAT, "kind": "thence run", "thence": __version__, **asdict(self)}
        write_where_other(folder / MARKER, to_json(facts, indent=1) + "\n")

    def with_recipe(self, recipe: Recipe) -> Marker:
        """The marker of the same run with these settings; a recipe.toml that is not thence's does not become so."""
        stages = dict.fromkeys([*self.stages, *recipe.stages])
        digests = dict.fromkeys([*self.recipe_digests, _digest(recipe_text(recipe))] if self.recipe_digests else [])
        return replace(self, recipe=kept_values(recipe), recipe_digests=tuple(digests), stages=tuple(stages))


def new_marker(recipe: Recipe) -> Marker:
    """The marker of a run that begins."""
    return Marker(kept_values(recipe), (_digest(recipe_text(recipe)),), tuple(recipe.stages))


def kept_values(recipe: Recipe) -> dict[str, Any]:
    """The resolved settings as a run keeps them: without secrets."""
    return redacted_values(recipe.resolved())


def recipe_text(recipe: Recipe) -> str:
    """What stands in ``recipe.toml``."""
    return to_toml(kept_values(recipe))


def write_where_other(file: Path, text: str) -> None:
    """Write a file atomically, if it does not hold this text already."""
    if not file.is_file() or file.read_bytes() != text.encode():
        write_atomically(file, text)


def read_marker(folder: Path) -> Marker | None:
    """The marker of a run; one made up for a run of an older version; None where the folder is no run.

    Raises:
        DamagedFile: the marker cannot be read.
        UserError: a later version wrote it.
    """
    file = folder / MARKER
    if not file.is_file() or file.is_symlink():
        return _of_older_run(folder)
    remedy = "move this file elsewhere: the run is then known by recipe.toml and environment.json"
    facts = read_json(file, remedy=remedy)
    if facts.get("format") != FORMAT and isinstance(facts.get("format"), int):
        raise UserError(
            f"a version of thence with run folders of format {facts['format']} wrote it, this one knows {FORMAT}",
            remedy="resume with that version, or give another --folder",
            file=file,
        )
    try:
        digests, stages = (tuple(map(str, facts[key])) for key in ("recipe_digests", "stages"))
        return Marker(dict(facts["recipe"]), digests, stages, bool(facts["restarting"]))
    except (KeyError, TypeError, ValueError):
        raise UserError("the marker of the run is damaged", remedy=remedy, file=file) from None


def recipe_of(folder: Path, marker: Marker) -> Recipe:
    """The settings that a run has. Raises UserError where this version of thence cannot read them."""
    try:
        return load_recipe(marker.recipe)
    except UserError as error:
        raise UserError(
            f"the settings of the run cannot be read: {error.field or 'recipe'}: {error.problem}",
            remedy="resume with the version of thence that wrote them, or give another --folder",
            file=folder / MARKER,
        ) from None


def _of_older_run(folder: Path) -> Marker | None:
    """Older versions left no marker: a run is a recipe that loads beside an environment that thence wrote."""
    kept = folder / RECIPE
    if not is_run(folder) or not kept.is_file():
        return None
    try:
        recipe = load_recipe(kept.absolute())
    except (OSError, ValueError, RecursionError, UserError):
        return None
    text = kept.read_text(encoding="utf-8")
    # an older version may have found the user's own recipe under this name, and left it
    own = (_digest(text),) if text == recipe_text(recipe) else ()
    return Marker(kept_values(recipe), own, tuple(recipe.stages))


def recipe_is_own(folder: Path, marker: Marker) -> bool:
    """Whether ``recipe.toml`` is as thence wrote it, or not there."""
    file = folder / RECIPE
    if not os.path.lexists(file):
        return True
    return not file.is_symlink() and file.is_file() and _file_digest(file) in marker.recipe_digests


@dataclass(frozen=True)
class Survey:
    """The content of a run folder.

    Args:
        files: thence's own.
        folders: thence's own, inner ones after those around them.
        foreign: everything else, not looked into.
        links: links under names of thence's own.
    """

    files: tuple[Path, ...]
    folders: tuple[Path, ...]
    foreign: tuple[Path, ...]
    links: tuple[Path, ...]


def survey(folder: Path, marker: Marker) -> Survey:
    """Tell thence's own files in a run folder from all others."""
    found: dict[str, list[Path]] = {"file": [], "folder": [], "foreign": [], "link": []}
    for kind, path in _walk(folder, "run", marker):
        found[kind].append(path)
    if (folder / RECIPE) in found["file"] and not recipe_is_own(folder, marker):
        found["file"].remove(folder / RECIPE)
        found["foreign"].append(folder / RECIPE)
    return Survey(*(tuple(found[kind]) for kind in ("file", "folder", "foreign", "link")))


def _walk(folder: Path, place: str, marker: Marker) -> Iterator[tuple[str, Path]]:
    named = frozenset(written_names(folder)) if place == "model" else frozenset[str]()
    for path in sorted(folder.iterdir()):
        inner, own = _place_of(place, path.name, marker), _is_own_file(place, path.name, named)
        if path.is_symlink():
            yield ("link" if inner or own else "foreign"), path
        elif path.is_dir() and inner:
            yield "folder", path
            yield from _walk(path, inner, marker)
        else:
            yield ("file" if own and path.is_file() else "foreign"), path


def _place_of(place: str, name: str, marker: Marker) -> str | None:
    """What thence keeps in a folder of this name; None: it makes none."""
    if place == "run":
        return {"stages": "stages", SET_ASIDE: "aside", "tensorboard": "tensorboard"}.get(name)
    if place == "stages":
        return "stage" if name in marker.stages else None
    if place == "tensorboard":
        return "events" if name in marker.stages else None
    if place == "aside":
        return "stage" if re.sub(r"-\d+$", "", name) in marker.stages else None
    if place == "stage":
        known = {"model": "model", f"{REPLACED}model": "model", ".model-writing": "temporary"}
        known |= {"adapter": "model", f"{REPLACED}adapter": "model", ".adapter-writing": "temporary"}
        return (known | {n: n for n in ("checkpoints", "parts", EVALUATION, EXPORTED)}).get(name)
    if place == EVALUATION:
        return "lines" if name in ("samples", "grades", "refused") else None
    if place == EXPORTED:
        if re.fullmatch(r"step-\d+-[0-9a-f]{8}", name):
            return "model"
        return "temporary" if re.fullmatch(r"\.step-\d+-[0-9a-f]{8}\.writing", name) else None
    if place == "checkpoints":
        if re.fullmatch(rf"({re.escape(REPLACED)})?step-\d+", name):
            return "model"
        return "temporary" if re.fullmatch(rf"{re.escape(WRITING)}\d+", name) else None
    return "temporary" if place == "temporary" else None


def _is_own_file(place: str, name: str, named: frozenset[str]) -> bool:
    if beside := _BESIDE.fullmatch(name):
        name = beside["hidden"] or beside["kept"]
    if place == "run":
        return name in _OF_RUN
    if place == "stage":
        return name in _OF_STAGE
    if place == "parts":
        return bool(_PART.fullmatch(name))
    if place == EXPORTED:
        return name == LOCK
    if place == EVALUATION:
        return name in _OF_EVALUATION or bool(_DATED.fullmatch(name))
    if place == "events":
        return name.startswith("events.out.tfevents.")
    if place == "lines":
        return name.endswith(".jsonl")
    return place == "temporary" or (place == "model" and name in named)


def is_beginning(path: Path) -> bool:
    """Whether this is what a process leaves that is killed before the marker, the first file of a run, is whole."""
    return path.name == LOCK or (path.name == f".{MARKER}.writing" and path.is_file() and not path.is_symlink())


def clear(folder: Path, marker: Marker) -> None:
    """Remove what thence wrote of a run, but for the marker, the lock and ``recipe.toml``, which are written again.

    Killed in the middle, the folder is cleared when it is opened again.

    Raises:
        UserError: the folder holds other things too; nothing is removed.
    """
    found = survey(folder, marker)
    refuse_foreign(folder, (*found.foreign, *found.links), marker)
    replace(marker, restarting=True).write(folder)
    stay = {folder / name for name in (MARKER, LOCK, RECIPE)}
    for path in found.files:
        if path not in stay:
            path.unlink(missing_ok=True)
    for path in reversed(found.folders):
        path.rmdir()


def refuse_unwritable(folder: Path) -> None:
    """Raise UserError if a run's folder, or the folder in which it would be made, cannot be written."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f"the run folder {folder} cannot be written: {place} is not a folder that you may write to",
            remedy="give another --folder",
            field="folder",
        )


def refuse_foreign(folder: Path, others: tuple[Path, ...], marker: Marker | None) -> None:
    """Raise UserError if there are things in a folder that thence did not write."""
    if not others:
        return
    names = ", ".join(str(path.relative_to(folder)) for path in others[:SHOWN])
    more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
    if marker is None:
        raise UserError(
            f"the folder is no run of thence and holds other things: {names}{more}",
            remedy="give another --folder: a new or empty one, or one that thence has made",
            file=folder,
            field="folder",
        )
    raise UserError(
        f"the folder of the run holds things that thence did not write: {names}{more}",
        remedy="move them elsewhere, then --restart again, or give another --folder",
        file=folder,
        field="folder",
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _file_digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()

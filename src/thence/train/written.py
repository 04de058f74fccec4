"""Models that thence wrote are as they were written, or they are not opened."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from thence.errors import DamagedFile
from thence.train.checkpoint import MANIFEST, damaged_file, manifest_of
from thence.train.run_marker import is_run

_ENTRY = re.compile(rb'"[^"\n]+": "[0-9a-f]{64}"')
_TOP = 1 << 20  # bytes of a damaged manifest that are looked at


def check_written(folder: Path) -> None:
    """Raise DamagedFile if thence wrote the model in this folder and it is no longer as it was written.

    thence knows its models by the manifest of checksums beside the weights, and by their place in a run. A folder with
    neither is not thence's and is not looked at. Files are read once a process while they do not change.
    """
    if not folder.is_dir():
        return
    run = _run_of(folder)
    if manifest_of(folder) is None and run is None and not _was_manifest(folder / MANIFEST):
        return
    # the stage has kept what its manifest was: one that is damaged would blame the file whose checksum it has lost
    wrong = run is not None and (folder / MANIFEST).is_file() and _left(folder) not in (None, _digest(folder))
    damaged = folder / MANIFEST if wrong else damaged_file(folder)
    if damaged is not None:
        gone = "is not there any more" if not damaged.exists() else "is not as it was written"
        raise DamagedFile(f"this file of a model that thence wrote {gone}", remedy=_remedy(folder, run), file=damaged)


def check_manifest(folder: Path) -> None:
    """Raise DamagedFile if the manifest of a stage's model is not the one that the stage has noted when it was done.

    One of the two files has changed since. A stage that was trained on this model would seem outdated. No weights are
    read.
    """
    noted = _left(folder)
    if noted is not None and (folder / MANIFEST).is_file() and noted != _digest(folder):
        raise DamagedFile(
            f"it notes the model's manifest as {noted}, and {MANIFEST} is {_digest(folder)}: one of them has changed",
            remedy=_remedy(folder, _run_of(folder)),
            file=folder.parent / "done.json",
        )


def _run_of(folder: Path) -> Path | None:
    """The run whose stage's model this is, by its place; None: it lies elsewhere."""
    place = folder.absolute()
    if place.name != "model" or place.parent.parent.name != "stages":
        return None
    run = place.parent.parent.parent
    return run if (place.parent / "done.json").is_file() and is_run(run) else None


def _was_manifest(file: Path) -> bool:
    """Whether a file that cannot be read as a manifest has been one."""
    try:
        with file.open("rb") as content:
            return bool(_ENTRY.search(content.read(_TOP)))
    except OSError:
        return False


def _left(model: Path) -> str | None:
    """What the stage said of its model when it was done: the first 16 digits of the manifest's checksum."""
    try:
        facts = json.loads((model.parent / "done.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    said = facts.get("model") if isinstance(facts, dict) else None
    return said if isinstance(said, str) else None


def _digest(model: Path) -> str:
    return hashlib.sha256((model / MANIFEST).read_bytes()).hexdigest()[:16]


def _remedy(folder: Path, run: Path | None) -> str:
    if run is None:
        return (
            "copy the model again from where it was written; if you have changed it on purpose, remove "
            f"{MANIFEST} from this copy"
        )
    stage = folder.absolute().parent.name
    comparison = next((place for place in run.parents if (place / "comparison.toml").is_file()), None)
    where = f"in {comparison}: " if comparison is not None else ""
    shown = run.relative_to(comparison) if comparison is not None else _shown(run)
    command = f"thence run {shown / 'recipe.toml'} --folder {shown} --repeat {stage}"
    return (
        f"put the file back from a copy, or repeat the stage, which sets the damaged model aside: {where}{command}; "
        f"a model that you have changed on purpose is opened from a copy elsewhere without {MANIFEST}"
    )


def _shown(path: Path) -> Path:
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path

"""Whether a folder is a comparison's own, so that nothing of others is written over."""

from __future__ import annotations

from pathlib import Path

from thence import __version__
from thence.compare.result import RESULTS, read_results
from thence.errors import UserError
from thence.files import to_json, write_atomically

MARKER = ".thence-comparison.json"
CONTRASTS = "contrasts.csv"
WRITTEN = ("comparison.toml", RESULTS, "report.html", "report.json", "runs.csv", "summary.csv", CONTRASTS)
WRITTEN += ("runs", "bases", "logs")


def check_folder(folder: Path) -> None:
    """Raise UserError if a comparison would write over something in this folder that is not its own.

    DamagedFile where results are there and cannot be read.

    A folder is a comparison's by its marker, or by results that can be read (an older version, a checkout of kept
    results). In any other, nothing may stand under a name that a comparison writes; nothing is ever removed.
    """
    if not folder.exists() or (folder / MARKER).is_file():
        return
    if not folder.is_dir():
        raise UserError("this is a file, not a folder", remedy="give another --folder", file=folder, field="folder")
    there = [name for name in WRITTEN if (folder / name).exists() or (folder / name).is_symlink()]
    if there and not _has_results(folder):
        raise UserError(
            f"the folder is no comparison of thence and holds things that one would write over: {', '.join(there[:3])}",
            remedy="give another --folder: a new or empty one",
            file=folder,
            field="folder",
        )


def mark(folder: Path) -> None:
    """Leave the marker."""
    if not (folder / MARKER).is_file():
        write_atomically(folder / MARKER, to_json({"format": 1, "kind": "thence comparison", "thence": __version__}))


def _has_results(folder: Path) -> bool:
    if not (folder / RESULTS).exists():  # an older version, killed before it wrote results
        return (folder / "comparison.toml").is_file() and (folder / "runs").is_dir() and (folder / ".lock").is_file()
    read_results(folder)
    return True

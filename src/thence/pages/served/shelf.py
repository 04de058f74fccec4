"""The pages that are served: of runs, made from their files as they are now; of others, the page that was written."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from pathlib import Path

from thence.errors import UserError
from thence.pages.run.page import current_page
from thence.pipeline.watching import Seen, look
from thence.redaction import redacted
from thence.train.run_marker import is_run
from thence.wording import duration

PAGE = "report.html"
_READ = ("recipe.toml", "metrics.jsonl", "changes.jsonl", "environment.json")
_READ_OF_STAGES = ("samples.jsonl", "result.json", "done.json")


@dataclass
class Shelf:
    """Folders whose pages are served; each is named by its place in the list, so no path is ever asked for.

    Args:
        folders: of runs, evaluations and comparisons.
    """

    folders: tuple[Path, ...]
    _made: dict[int, tuple[str, str]] = field(default_factory=dict)
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def stamp(self, place: int) -> str:
        """A text that changes when the page would."""
        folder = self.folders[place]
        files = [folder / name for name in _READ]
        files += [path for name in _READ_OF_STAGES for path in sorted(folder.glob(f"stages/*/{name}"))]
        facts = []
        for file in files if is_run(folder) else [folder / PAGE]:
            try:
                stat = file.stat()
            except OSError:
                continue
            facts.append((str(file), stat.st_mtime_ns, stat.st_size))
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def page(self, place: int) -> str:
        """The page as HTML; it is made once for each state of the files.

        Raises:
            UserError: there is none yet.
        """
        folder = self.folders[place]
        if not is_run(folder):
            return _written(folder)
        with self._turn:
            stamp = self.stamp(place)
            if self._made.get(place, ("", ""))[0] != stamp:
                self._made[place] = stamp, current_page(folder)
            return self._made[place][1]

    def said(self, place: int) -> str:
        """Where a run is, in a line."""
        folder = self.folders[place]
        if not is_run(folder):
            return "" if (folder / PAGE).is_file() else "no page yet"
        return described(look(folder))


def described(seen: Seen) -> str:
    """State, stage, steps and time left of a run, in a line."""
    if seen.state == "done":
        return "done"
    steps = f"{seen.step:,}" + (f" of {seen.total:,} steps" if seen.total else " steps")
    left = "" if seen.seconds is None or seen.state == "stopped" else f", about {duration(seen.seconds)} left of it"
    state = {"stopped": "stopped: no process runs it", "running": "running", "unclear": "running or stopped"}[
        seen.state
    ]
    return f"{state}; {seen.stage or 'no stage yet'}: {steps}{left}"


def _written(folder: Path) -> str:
    page = folder / PAGE
    if page.is_symlink() or not page.is_file():
        raise UserError("there is no page here yet", remedy="`thence eval` and `thence compare` write it", file=folder)
    return page.read_text(encoding="utf-8")


def shelf_of(names: tuple[str, ...]) -> Shelf:
    """The folders that are named, by path or by name under runs/ or evals/; all of those where none is named.

    Raises:
        UserError: a name leads to nothing that has a page, or there is nothing at all.
    """
    if not names:
        found = tuple(
            sorted(folder for top in ("runs", "evals") for folder in Path(top).glob("*") if _has_page(folder))
        )
        if not found:
            raise UserError(
                "nothing to show: no run under runs/ and no evaluation under evals/", remedy="name a folder"
            )
        return Shelf(found)
    return Shelf(tuple(dict.fromkeys(_found(name) for name in names)))


def _found(name: str) -> Path:
    for folder in (Path(name), Path("runs") / name, Path("evals") / name):
        if _has_page(folder):
            return folder
    raise UserError(
        f"no run, evaluation or comparison at {redacted(name)}",
        remedy="give the folder that `thence run`, `thence eval` or `thence compare` printed",
        file=name,
    )


def _has_page(folder: Path) -> bool:
    return is_run(folder) or (folder / "evaluation.toml").is_file() or (folder / "comparison.toml").is_file()

"""``thence report``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from thence.errors import UserError


def report_command(run: str, /, *others: str, out: Path | None = None) -> int:
    """Write the report page of a run again and print its table; of several runs, one page with all of them.

    Examples:

      thence report runs/quickstart-seed0
      thence report runs/quickstart-seed0 runs/quickstart-seed1 --out both.html

    Args:
        run: The folder that `thence run` printed, or its name under runs/.
        others: More runs: their curves are laid over each other, their results stand side by side.
        out: The file to write for several runs. Default: report-NAMES.html beside the runs.
    """
    from thence.pages.run.page import write_page
    from thence.pages.run.tables import results_table
    from thence.pages.terminal import with_notes
    from thence.pipeline.run_files import read_run
    from thence.terminal import make_console

    if others:
        return _report_of_several((run, *others), out)
    if out is not None:
        raise UserError(
            "a single run keeps its page in its own folder", remedy="leave --out away, or name more runs", field="--out"
        )
    folder = existing_run(run, to_write=True)
    page = write_page(folder)
    console = make_console()
    console.print(with_notes(results_table(read_run(folder))))
    console.print(f"report: {page}", soft_wrap=True)
    return 0


def _report_of_several(names: Sequence[str], out: Path | None) -> int:
    from thence.pages.overlay.page import named_runs, page_of, write_page
    from thence.pages.overlay.tables import results_of_all
    from thence.pages.terminal import with_notes
    from thence.redaction import as_typed, redacted_command
    from thence.terminal import make_console

    folders = list({(folder := existing_run(name)).resolve(): folder for name in names}.values())
    if len(folders) < 2:
        raise UserError("these are one run", remedy="name two different runs, or one", field="run")
    path = out or page_of(folders)
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}", remedy="make it, or give another file", field="--out")
    console = make_console()
    write_page(folders, path, redacted_command(as_typed(sys.argv)))
    console.print(with_notes(results_of_all(named_runs(folders))))
    console.print(f"report: {path}", soft_wrap=True)
    return 0


def existing_run(name: str, *, to_write: bool = False) -> Path:
    """A run folder by path or by its name under ``runs/``.

    Args:
        to_write: something will be written there: the folder must be known as a run, not only look like one.

    Raises:
        UserError: there is none.
    """
    from thence.train.run_marker import is_run

    for folder in (Path(name), Path("runs") / name):
        if is_run(folder) or (not to_write and (folder / "recipe.toml").exists()):
            return folder
    raise UserError(f"no run at {name}", remedy="give the folder that `thence run` printed", file=name)

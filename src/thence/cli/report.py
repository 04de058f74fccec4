"""``thence report``."""

from __future__ import annotations

from pathlib import Path

from thence.errors import UserError


def report_command(run: str, /) -> int:
    """Write the report page of a run again and print its table.

    Example:

      thence report runs/quickstart-seed0

    Args:
        run: The folder that `thence run` printed, or its name under runs/.
    """
    from thence.pages.run.page import write_page
    from thence.pages.run.tables import results_table
    from thence.pages.terminal import with_notes
    from thence.pipeline.run_files import read_run
    from thence.terminal import make_console

    folder = existing_run(run, to_write=True)
    page = write_page(folder)
    console = make_console()
    console.print(with_notes(results_table(read_run(folder))))
    console.print(f"report: {page}", soft_wrap=True)
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

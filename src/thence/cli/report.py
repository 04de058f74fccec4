"""``thence report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from thence.errors import UserError


def report_command(argv: Sequence[str]) -> int:
    """Write a run's report page again and print its table."""
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("thence report takes one run folder", remedy="thence report runs/quickstart-seed0")
    from thence.report.page import write_report
    from thence.report.table import results_table
    from thence.terminal import make_console

    folder = existing_run(argv[0])
    page = write_report(folder)
    console = make_console()
    console.print(results_table(folder))
    console.print(f"report: {page}", soft_wrap=True)
    return 0


def existing_run(name: str) -> Path:
    """A run folder by path or by its name under ``runs/``. Raises UserError."""
    for folder in (Path(name), Path("runs") / name):
        if (folder / "recipe.toml").exists():
            return folder
    raise UserError(f"no run at {name}", remedy="give the folder that `thence run` printed", file=name)

"""What a command shows while it works: a picture that moves on a terminal, plain lines where output is piped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BAR_WIDTH = 24
GLUE = "\u00a0"
"""The space within a part: no line is broken there."""


class SideBySide:
    """Short texts, two spaces apart. A line is broken between two of them and not within, unless one is too long."""

    def __init__(self, parts: Iterable[str | Text]):
        self.parts = [Text(part.replace(" ", GLUE)) if isinstance(part, str) else part for part in parts]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # not left to rich, which breaks a line at every kind of space
        line = Text()
        for part in self.parts:
            if line and line.cell_len + 2 + part.cell_len > options.max_width:
                yield line
                line = Text()
            line = line + "  " + part if line else part.copy()
        yield line


class Display:
    """A picture on a terminal from entry to exit, else lines.

    Args:
        picture: rich's live picture; it draws on the same console.
    """

    def __init__(self, console: Console, picture: Live):
        self.console, self.picture, self.animated = console, picture, console.is_terminal

    def __enter__(self) -> Self:
        if self.animated:
            self.picture.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.animated:
            self.picture.stop()

    def line(self, text: str, *, wrap: bool = True) -> None:
        """Print a line where output is piped; on a terminal the picture says it."""
        if not self.animated:
            self.console.print(text, soft_wrap=not wrap, highlight=False, markup=False)


def bar_line(done: int, total: int, left: str) -> Table:
    """A bar, how much is done, and the time left."""
    line = Table.grid(padding=(0, 2, 0, 0))
    line.add_row(ProgressBar(total=total, completed=done, width=BAR_WIDTH), Text(f"{done:,}/{total:,}"), Text(left))
    return line

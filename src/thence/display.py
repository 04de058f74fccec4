"""What a command shows while it works: a picture that moves on a terminal, plain lines where output is piped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TaskID, TextColumn
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
        picture: rich's live table or bar; it draws on the same console.
    """

    def __init__(self, console: Console, picture: Live | Progress):
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


class BarDisplay(Display):
    """A bar for each task, one after the other: its name, how much of it is done, facts.

    Args:
        seconds: between two plain lines.
        name_width: columns of the name of a task.
        columns: stand between the count and the facts.
    """

    def __init__(self, console: Console, seconds: float, name_width: int, *columns: ProgressColumn):
        self.bar = Progress(
            TextColumn(f"{{task.description:<{name_width}}}", markup=False),
            BarColumn(bar_width=BAR_WIDTH),
            MofNCompleteColumn(),
            *columns,
            TextColumn("{task.fields[facts]}", markup=False),
            console=console,
        )
        super().__init__(console, self.bar)
        self.seconds, self.name, self.total, self.done = seconds, "", 0, 0
        self._task: TaskID | None = None

    def start_task(self, name: str, total: int, done: int) -> None:
        """Show the bar of a task of which ``done`` of ``total`` is done."""
        self.name, self.total, self.done = name, total, done
        if self.animated:
            self._task = self.bar.add_task(name, total=total, completed=done, facts="")

    def redraw(self, facts: str) -> bool:
        """Bring the bar up to date. Returns whether there is one; else a line may be due."""
        if self._task is None:
            return False
        self.bar.update(self._task, completed=self.done, facts=facts)
        return True

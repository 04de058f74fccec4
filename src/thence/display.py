"""What a command shows while it works: a picture that moves on a terminal, plain lines where output is piped."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TaskID, TextColumn

BAR_WIDTH = 24


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

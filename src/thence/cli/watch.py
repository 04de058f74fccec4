"""``thence watch``: a run, seen from another terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from thence.cli.report import existing_run
from thence.cli.sample import COLOURS
from thence.display import BAR_WIDTH, GLUE, SideBySide
from thence.foreign_text import one_line
from thence.terminal import make_console
from thence.wording import duration

if TYPE_CHECKING:
    from thence.pipeline.watching import Seen

CURVES = (
    ("reward", "reward", "{:.3f}"),
    ("loss", "loss", "{:.3f}"),
    ("held_out_loss", "held-out loss", "{:.3f}"),
    ("eval", "eval", "{:.3f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("response_tokens", "length, tokens", "{:.0f}"),
    ("truncated", "truncated", "{:.1%}"),
    ("tokens_per_s", "tokens a second", "{:,.0f}"),
)
"""Quantity, its name, how its last value is written."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_SHOWN = 240
"""Characters of a prompt or a response."""


def watch_command(
    run: str, /, *, once: bool = False, every: Annotated[float, Parameter(metavar="SECONDS")] = 1.0
) -> int:
    """Watch a run from another terminal: its stage, the time left, its curves, its last sample.

    It reads the run's files and changes nothing. It ends when the run ends (exit code 0), or when no process runs the
    run any more (exit code 1). Control-C stops watching, not the run.

    Examples:

      thence watch runs/quickstart-seed0
      thence watch quickstart-seed0 --once

    Args:
        run: The folder of the run, or its name under runs/.
        once: Show it once and end.
        every: Seconds between two looks.
    """
    from thence.errors import UserError
    from thence.pipeline.watching import look

    if not 0.1 <= every <= 3600:
        raise UserError(f"{every:g} s between two looks", remedy="give 0.1 to 3600 seconds", field="--every")
    folder = existing_run(run)
    console = make_console(verbatim=True)
    if once:
        seen = look(folder)
        console.print(screen(seen, console.width))
    elif console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(screen(seen := look(folder), console.width), refresh=True)
                if seen.state in ("done", "stopped"):
                    break
                time.sleep(every)
    else:
        seen = _lines(folder, console, every)
    return _ended(seen)


def _lines(folder: Any, console: Console, every: float) -> Seen:
    """A line whenever something has changed, where nobody looks at a screen."""
    from thence.pipeline.watching import look

    said = ""
    while True:
        seen = look(folder)
        told = filter(None, [where(seen), whole_run(seen)])
        text = "  ".join([*told, *(f"{name} {value}" for name, value, _ in curves(seen, 0))])
        if text != said:
            console.print(text, soft_wrap=True)
            said = text
        if seen.state in ("done", "stopped"):
            return seen
        time.sleep(every)


def _ended(seen: Seen) -> int:
    if seen.state != "stopped":
        return 0
    print(
        f"thence: no process runs this run, and {', '.join(s for s in seen.stages if s not in seen.done)} "
        f"{'is' if len(seen.stages) - len(seen.done) == 1 else 'are'} not done\n"
        f"  remedy: resume it: thence run {seen.folder / 'recipe.toml'}",
        file=sys.stderr,
    )
    return 1


def where(seen: Seen) -> str:
    """Where a run is, in one line: stage, steps, time left."""
    if seen.state == "done":
        return "done"
    stage = seen.stage or "no stage yet"
    if seen.doing:
        stage = f"{seen.doing} ..."
    else:
        stage += f" {seen.step:,}" + (f" of {seen.total:,}" if seen.total else "")
    if seen.state == "stopped":
        return f"stopped in {stage}"
    return (
        stage if seen.doing or seen.seconds is None else f"{stage}, about {duration(seen.seconds)} left of this stage"
    )


def whole_run(seen: Seen) -> str:
    """How long the whole run will take; "" where that is not known, or is what :func:`where` says already."""
    last = not seen.doing and seen.stages[-1:] == (seen.stage,)
    return "" if seen.state in ("done", "stopped") or last or not str(seen.whole) else f"whole run: {seen.whole}"


def screen(seen: Seen, width: int) -> Group:
    """The whole picture, in ``width`` columns."""
    colour = {"done": "green", "running": "cyan", "stopped": "red", "unclear": "yellow"}[seen.state]
    parts: list[Any] = [Text.assemble((seen.name, "bold"), "  ", (seen.state, colour)), _stages(seen)]
    if seen.total and seen.state != "done":
        bar = Table.grid(padding=(0, 2, 0, 0))
        bar.add_row(ProgressBar(total=seen.total, completed=seen.step, width=BAR_WIDTH), Text(where(seen)))
        parts.append(bar)
    elif seen.state != "done":
        parts.append(Text(where(seen)))
    if left := whole_run(seen):
        parts.append(Text(left, "dim"))
    if rows := curves(seen, max(10, width - 30)):
        assert seen.metrics is not None
        table = Table.grid(padding=(0, 2, 0, 0))
        for name, value, line in rows:
            table.add_row(Text(name, "dim"), Text(value, justify="right"), Text(line, "cyan", no_wrap=True))
        parts += [Text(f"\n{seen.metrics.stage}, steps 1 to {len(seen.metrics.steps):,}", "bold"), table]
    if seen.sample:
        parts += _sample(seen.sample)
    return Group(*parts)


def _stages(seen: Seen) -> SideBySide:
    """Every stage, and which of them are done."""
    said = []
    for name in seen.stages:
        style = "green" if name in seen.done else "bold" if name == seen.stage else "dim"
        word = "done" if name in seen.done else "now" if name == seen.stage else "to come"
        said.append(Text(f"{name} {word}".replace(" ", GLUE), style))
    return SideBySide(said)


def curves(seen: Seen, width: int) -> list[tuple[str, str, str]]:
    """Name, last value and line of each quantity of the last training stage that has any."""
    found = []
    for key, name, pattern in CURVES if seen.metrics else ():
        assert seen.metrics is not None
        values = seen.metrics.series(key)[1]
        if values:
            found.append((name, pattern.format(values[-1]), sparkline(values, width)))
    return found


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as blocks, from the lowest to the highest of them; means of neighbours where there are more than fit."""
    if len(values) > width > 0:
        cuts = [place * len(values) // width for place in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(values), max(values)
    if high == low:
        return _BLOCKS[0] * len(values)
    return "".join(_BLOCKS[round((value - low) / (high - low) * (len(_BLOCKS) - 1))] for value in values)


def _sample(sample: Any) -> list[Any]:
    verdict = str(sample["verdict"])
    step = f", step {sample['step']}" if sample.get("step") else ""
    head = Text.assemble(
        ("\nlast sample", "bold"), f"  {sample['stage']}{step}  ", (verdict, COLOURS.get(verdict, "dim"))
    )
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key in ("prompt", "response", "answer"):
        if isinstance(text := sample.get(key), str):
            table.add_row(Text(f"  {key}", "dim"), Text(one_line(text, _SHOWN)))
    return [head, table]

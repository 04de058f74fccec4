"""An evaluation on the terminal: progress, the table of results, the table of differences."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from types import TracebackType

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from thence.evaluate.backends import Generation, Refused
from thence.evaluate.summary import Comparison, Result, TaskResult
from thence.foreign_text import one_line
from thence.stats.spread import Score
from thence.wording import counted


class Terminal:
    """Shows a bar where there is a terminal, else a line every ``seconds``: samples, tokens a second, time left.

    The time that is left is for the samples of all tasks. Samples may end in bursts (a wave of rows at a time), so
    lines are printed by the clock and not by the sample, and speed is measured up to the last sample.
    """

    def __init__(self, console: Console, seconds: float = 5.0):
        self.console, self.seconds = console, seconds
        self.name, self.total, self.done, self.missing = "", 0, 0, 0
        self.made = self.tokens = self.printed = 0
        self.started = self.last = time.monotonic()
        columns = [TextColumn("{task.description:<16}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn()]
        self.bar = Progress(*columns, TextColumn("{task.fields[facts]}", markup=False), console=console)
        self.task: TaskID | None = None
        self._closed = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Terminal:
        if self.console.is_terminal:
            self.bar.start()
        else:
            self._clock.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self.console.is_terminal:
            self.bar.stop()
        else:
            self._clock.join()

    def begin(self, missing: int) -> None:
        self.missing = missing

    def sampling(self, task: str, total: int, done: int) -> None:
        self.name, self.total, self.done = task, total, done
        if not self.made:
            self.started = time.monotonic()  # loading the model is not sampling
        if self.console.is_terminal:
            self.task = self.bar.add_task(task, total=total, completed=done, facts="")
        elif done < total:
            begun = f"resumed after {done:,} of {total:,} samples" if done else counted(total, "sample")
            self.console.print(f"{task}: {begun}", highlight=False)

    def sampled(self, generation: Generation) -> None:
        self.done, self.made, self.last = self.done + 1, self.made + 1, time.monotonic()
        self.tokens += generation.tokens or 0
        if self.console.is_terminal and self.task is not None:
            self.bar.update(self.task, completed=self.done, facts=self._facts())
        elif self.done == self.total:
            self._line()

    def refused(self, refused: Refused) -> None:
        self.done, self.missing = self.done + 1, max(0, self.missing - 1)
        if self.console.is_terminal and self.task is not None:
            self.bar.update(self.task, completed=self.done, facts=self._facts())
        elif self.done == self.total:
            self._line()

    def grading(self, task: str, total: int) -> None:
        if not self.console.is_terminal:
            self.console.print(f"{task}: grading {counted(total, 'sample')}", highlight=False)

    def _tick(self) -> None:
        while not self._closed.wait(self.seconds):
            if self.made != self.printed:
                self._line()

    def _line(self) -> None:
        self.printed = self.made
        self.console.print(f"{self.name} {self.done:,}/{self.total:,}  {self._facts()}", highlight=False)

    def _facts(self) -> str:
        seconds = max(self.last - self.started, 1e-9)
        speed = f"{self.tokens / seconds:,.0f} tok/s  {self.tokens / self.made:,.0f} tok each  " if self.tokens else ""
        return f"{speed}{duration(seconds / max(1, self.made) * max(0, self.missing - self.made))} left"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def results_view(result: Result) -> Group:
    """The results as a table, with what has to be known to read it."""
    rows = result.tasks
    several = any(row.task.samples > 1 for row in rows)
    lenient = any(row.lenient is not None for row in rows)
    optional = (["pass@k", "maj@k"] if several else []) + (["lenient"] if lenient else [])
    unanswered = result.not_answered > 0
    names = ["n", *(["unanswered"] if unanswered else []), "k", "avg@k", "interval", *optional, "unknown", "cut"]
    names.append("tokens")
    degrees = [row for row in rows if row.reward is not None]
    all_graded = bool(degrees) and len(degrees) == len(rows)
    title = "Mean reward" if all_graded else "Right answers, %"
    if degrees:
        names[names.index("avg@k")] = "reward" if all_graded else "avg@k, or reward *"
    table = _table(f"{title} (95% interval over problems)", names)
    for row in rows:
        table.add_row(*_cells(row, several, lenient, unanswered, mark="" if all_graded else " *"))
    for group in result.groups:
        table.add_section()
        mean = Text(percent(group.score), style="bold")
        before = [""] * (3 if unanswered else 2)
        table.add_row(f"{group.name} mean of {len(group.tasks)}", *before, mean, ends(group.score))
    return Group(table, *(Text(line, style="dim") for line in notes(result)))


def notes(result: Result) -> list[str]:
    """What has to be known to read the table, in sentences."""
    settings, rows = result.settings, result.tasks
    temperatures = ", ".join(dict.fromkeys(f"{row.task.temperature:g}" for row in rows))
    limits = ", ".join(dict.fromkeys(f"{row.task.max_tokens:,}" for row in rows))
    seeds = ", ".join(dict.fromkeys(str(row.task.seed) for row in rows))
    versions = ", ".join(dict.fromkeys(f"{row.grader} ({'; '.join(row.versions) or 'none yet'})" for row in rows))
    how = f"T = {temperatures}, at most {limits} tokens, seed {seeds}, graded by {versions}"
    lines = [f"n problems, k samples each, {how}"]
    if settings.limit is not None:
        lines.append(f"only the first {settings.limit} problems of every task")
    if result.missing:
        lines.append(
            f"unfinished: {counted(result.missing, 'sample')} missing; problems without all samples are left out"
        )
    lines += _not_answered(result)
    if any(row.lenient is not None for row in rows):
        lines.append("lenient: any way to name the right letter counts; not comparable with published numbers")
    if degrees := [row.task.name for row in rows if row.graded]:
        lines.append(
            f"mean reward, of any scale: {', '.join(degrees)}; the grader gives degrees and states no score from which "
            "a response is right (right_from), so there is no share of right answers"
        )
    if short := sum(row.short for row in rows):
        lines.append(f"the model's context left less than the limit of tokens for {short:,} responses")
    return lines


def _not_answered(result: Result) -> list[str]:
    """What was left out, and what ended in a way that is not the model's."""
    lines = []
    for row in result.tasks:
        if row.not_answered:
            kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(row.not_answered_kinds.items()))
            key, reason = next(iter(row.not_answered.items()))
            lines.append(
                f"{row.task.name}: {len(row.not_answered):,} of {row.expected:,} problems were not answered ({kinds}), "
                f"and the numbers are over the others; for example {key}: {one_line(reason)}"
            )
    if lines:
        lines.append("run the same command again to ask them again")
    ends = Counter({name: 0 for row in result.tasks for name in row.other_ends})
    for row in result.tasks:
        ends.update(row.other_ends)
    if ends:
        found = ", ".join(f"{one_line(name, 40)} {count:,}" for name, count in sorted(ends.items()))
        lines.append(f"responses that did not end with stop or length, as the server calls it: {found}")
    return lines


def _table(title: str, names: list[str]) -> Table:
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False
    )
    table.add_column("task", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(row: TaskResult, several: bool, lenient: bool, unanswered: bool, mark: str) -> list[str]:
    k = row.task.samples
    problems = f"{len(row.shares):,}" + (f" of {row.expected:,}" if len(row.shares) != row.expected else "")
    cells = [row.task.name, problems, *([f"{len(row.not_answered):,}"] if unanswered else [])]
    level = [percent(row.avg), ends(row.avg)]
    if row.reward is not None:
        level = [f"{degree(row.reward)}{mark}", degree_ends(row.reward)]
    cells += [str(k), *level]
    if several:
        cells += [percent(row.passed.get(k)) if k > 1 else "–", percent(row.majority)]
    if lenient:
        cells.append(percent(row.lenient))
    tokens = "–" if row.mean_tokens is None else f"{row.mean_tokens:,.0f}"
    return [*cells, f"{row.unknown:,}", f"{row.truncated:,}", tokens]


def percent(score: Score | None) -> str:
    """A score in per cent."""
    return "–" if score is None else f"{100 * score.value:.1f}"


def ends(score: Score | None) -> str:
    """The ends of its interval in per cent. Near 0 and 100 they are not at the same distance: no ± would be true."""
    return "–" if score is None else f"{100 * score.low:.1f} to {100 * score.high:.1f}"


def degree(score: Score) -> str:
    """A mean reward, on its own scale."""
    return f"{score.value:.4g}"


def degree_ends(score: Score) -> str:
    """The ends of its interval; none for a single problem."""
    return "–" if math.isinf(score.high) else f"{score.low:.4g} to {score.high:.4g}"


def comparison_view(comparison: Comparison) -> Group:
    """Paired differences as a table."""
    a, b = comparison.a.settings, comparison.b.settings
    names = ["n", "A", "B", "B - A", "interval", "p"]
    table = _table("B minus A on the same problems, % points (95% interval)", names)
    for row in comparison.rows:
        pair = row.paired
        table.add_row(
            *(row.task.name, f"{pair.problems:,}", f"{100 * row.a:.1f}", f"{100 * row.b:.1f}"),
            *(f"{100 * pair.difference:+.1f}", interval(pair.low, pair.high), p_value(pair.p_value)),
        )
    for name, value, low, high in comparison.groups:
        table.add_section()
        table.add_row(f"{name} mean", "", "", "", f"{100 * value:+.1f}", interval(low, high), "")
    lines = [f"A: {_model(a.model, a.stage)}", f"B: {_model(b.model, b.stage)}"]
    lines += [f"they differ in more than the model: {name}: {old} / {new}" for name, old, new in comparison.unlike]
    if comparison.only:
        lines.append(f"only one of them has: {', '.join(comparison.only)}")
    if len(comparison.rows) > 1:
        lines.append("p-values are for one task each; over several tasks some are small by chance")
    return Group(table, *(Text(line) for line in lines))


def interval(low: float, high: float) -> str:
    """An interval in per cent."""
    return f"{100 * low:+.1f} to {100 * high:+.1f}"


def p_value(p: float) -> str:
    """A p-value with two significant digits."""
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def _model(name: str, stage: str | None) -> str:
    return name if stage is None or name.endswith(f":{stage}") else f"{name} (stage {stage})"

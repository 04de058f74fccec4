"""The results of an evaluation, and the differences of two, as tables with what has to be known to read them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count

from thence.evaluate.summary import EvaluationComparison, Result, TaskResult
from thence.foreign_text import one_line
from thence.pages.samples import ENDS
from thence.pages.table import NOTHING, Cell, Table, TableRow
from thence.stats.multiplicity import holm
from thence.stats.spread import Score
from thence.wording import counted


def results_table(result: Result, whole: bool = False) -> Table:
    """Scores in per cent, or mean rewards; a row a task, and the means of groups. Notes say how to read it.

    Args:
        result: the numbers.
        whole: with every count and with intervals below the scores, as a page has room for; else with the interval of
            the first score in a column of its own.
    """
    rows = result.tasks
    degrees = [row for row in rows if row.reward is not None]
    all_graded = bool(degrees) and len(degrees) == len(rows)
    what = "Mean reward" if all_graded else "Right answers, %"
    level = "avg@k" if not degrees else "reward" if all_graded else "avg@k, or reward *"
    columns = _columns(result, level, whole, mark="" if all_graded else " *")
    names = list(columns)
    found = []
    for row in rows:
        label, group = (row.task.title or row.task.name, row.task.group) if whole else (row.task.name, "")
        found.append(TableRow(label, tuple(cell(row) for cell in columns.values()), group))
    for group in result.groups:
        mean = {level: Cell(score_text(group.score), ends(group.score) if whole else "", strong=True)}
        mean |= {"interval": Cell(ends(group.score))}
        cells = tuple(mean.get(name, Cell("")) for name in names)
        found.append(TableRow(f"{group.name} mean of {len(group.tasks)}", cells, apart=True))
    title = f"{what} (95% interval over problems)"
    return Table(title, (what if whole else "task", *names), tuple(found), tuple(notes(result)))


def _columns(result: Result, level: str, whole: bool, mark: str) -> dict[str, Callable[[TaskResult], Cell]]:
    """Headers and what stands below them."""
    rows = result.tasks

    def scored(score: Score | None) -> Cell:
        return NOTHING if score is None else Cell(score_text(score), ends(score) if whole else "")

    columns: dict[str, Callable[[TaskResult], Cell]] = {}

    def level_of(row: TaskResult) -> Cell:
        return scored(row.avg) if row.reward is None else _reward(row.reward, whole, mark)

    if whole:  # first, so that a narrow screen shows it
        columns[level] = level_of
    columns["n"] = _problems
    if result.not_answered:
        columns["unanswered"] = lambda row: Cell(f"{len(row.not_answered):,}")
    columns["k"] = lambda row: Cell(str(row.task.samples))
    if not whole:
        columns[level] = level_of
    if not whole:
        columns["interval"] = lambda row: Cell(ends(row.avg) if row.reward is None else degree_ends(row.reward))
    if any(row.task.samples > 1 for row in rows):
        columns["pass@k"] = lambda row: scored(row.passed.get(row.task.samples) if row.task.samples > 1 else None)
        columns["maj@k"] = lambda row: scored(row.majority)
        if whole:
            columns["never"] = lambda row: NOTHING if row.avg is None else Cell(f"{row.never:,}")
            columns["always"] = lambda row: NOTHING if row.avg is None else Cell(f"{row.always:,}")
    if any(row.lenient is not None for row in rows):
        columns["lenient"] = lambda row: scored(row.lenient)
    if whole:
        columns["right"] = lambda row: Cell(f"{row.right:,}")
        columns["wrong"] = lambda row: Cell(f"{row.wrong:,}")
        if any(row.graded for row in rows):
            columns["graded"] = lambda row: Cell(f"{row.graded:,}")
    columns["unknown"] = lambda row: Cell(f"{row.unknown:,}")
    columns["cut"] = lambda row: Cell(f"{row.truncated:,}")
    digits = 1 if whole else 0
    columns["tokens"] = lambda row: NOTHING if row.mean_tokens is None else Cell(f"{row.mean_tokens:,.{digits}f}")
    return columns


def _problems(row: TaskResult) -> Cell:
    counted = len(row.shares)
    return Cell(f"{counted:,}" + (f" of {row.expected:,}" if counted != row.expected else ""))


def _reward(score: Score, whole: bool, mark: str) -> Cell:
    if not whole:
        return Cell(f"{degree(score)}{mark}")
    between = "" if degree_ends(score) == "–" else f"{degree_ends(score)} "
    return Cell(degree(score), f"{between}mean reward")


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
    if told := [_never_and_always(row) for row in rows if row.avg is not None and row.task.samples > 1]:
        lines.append(
            f"problems with no right sample / with only right ones: {', '.join(told)}; RL that compares the samples "
            "of a problem (GRPO) learns nothing from these"
        )
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


def _never_and_always(row: TaskResult) -> str:
    problems = len(row.shares)
    return f"{row.task.name} {row.never / problems:.0%} / {row.always / problems:.0%}"


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
    for played in (False, True):
        ends: Counter[str] = Counter()
        for row in result.tasks:
            if (row.task.environment is not None) == played:
                ends.update(row.other_ends)
        if ends:
            words = {name: ENDS.get(name, name) if played else one_line(name, 40) for name in ends}
            found = ", ".join(f"{words[name]} {count:,}" for name, count in sorted(ends.items()))
            served = "responses that did not end with stop or length, as the server calls it"
            lines.append(f"{'rollouts that did not end by themselves or were cut' if played else served}: {found}")
    return lines


def comparison_table(comparison: EvaluationComparison) -> Table:
    """Paired differences of two evaluations; a row a task, and the means of groups."""
    notes = [*_sides(comparison, "B"), *_doubts(comparison, "B")]
    if len(comparison.rows) > 1:
        notes.append("p-values are for one task each; over several tasks some are small by chance")
    return _differences(comparison, "B", [p_value(row.paired.p_value) for row in comparison.rows], notes)


def comparison_tables(comparisons: Sequence[EvaluationComparison]) -> list[Table]:
    """Paired differences of several evaluations from the first, a table each.

    Their p-values are corrected together: with every further evaluation one more is small by chance.
    """
    p_values = [row.paired.p_value for comparison in comparisons for row in comparison.rows]
    corrected = iter(holm(p_values))
    tables = []
    for letter, comparison in zip(letters(1), comparisons, strict=False):
        notes = [*_sides(comparison, letter), *_doubts(comparison, letter)]
        tables.append(_differences(comparison, letter, [p_value(next(corrected)) for _ in comparison.rows], notes))
    last = tables[-1]
    said = f"p-values are corrected for all {len(p_values)} tests (Holm)"
    tables[-1] = replace(last, notes=(*last.notes, said))
    return tables


def letters(start: int) -> Iterator[str]:
    """A, B, ... Z, AA, AB, ... from a place on."""
    for place in count(start):
        name, rest = "", place
        while rest >= 0:
            name, rest = chr(ord("A") + rest % 26) + name, rest // 26 - 1
        yield name


def _differences(comparison: EvaluationComparison, other: str, ps: Sequence[str], notes: Sequence[str]) -> Table:
    rows = []
    for row, p in zip(comparison.rows, ps, strict=True):
        pair = row.paired
        texts = [f"{pair.problems:,}", f"{100 * row.a:.1f}", f"{100 * row.b:.1f}"]
        texts += [f"{100 * pair.difference:+.1f}", interval(pair.low, pair.high), p]
        rows.append(TableRow(row.task.name, tuple(map(Cell, texts))))
    for name, value, low, high in comparison.groups:
        texts = ["", "", "", f"{100 * value:+.1f}", interval(low, high), ""]
        rows.append(TableRow(f"{name} mean", tuple(map(Cell, texts)), apart=True))
    title = f"{other} minus A on the same problems, % points (95% interval)"
    return Table(title, ("task", "n", "A", other, f"{other} - A", "interval", "p"), tuple(rows), tuple(notes))


def _sides(comparison: EvaluationComparison, other: str) -> list[str]:
    a, b = comparison.a.settings, comparison.b.settings
    return [f"A: {_model(a.model, a.stage)}", f"{other}: {_model(b.model, b.stage)}"]


def _doubts(comparison: EvaluationComparison, other: str) -> list[str]:
    """What differs besides the model, so that the difference need not be the model's."""
    lines = [f"they differ in more than the model: {name}: {old} / {new}" for name, old, new in comparison.unlike]
    if comparison.only:
        lines.append(f"only one of A and {other} has: {', '.join(comparison.only)}")
    return lines


def score_text(score: Score | None) -> str:
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


def interval(low: float, high: float) -> str:
    """An interval in per cent."""
    return f"{100 * low:+.1f} to {100 * high:+.1f}"


def p_value(p: float) -> str:
    """A p-value with two significant digits."""
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def _model(name: str, stage: str | None) -> str:
    return name if stage is None or name.endswith(f":{stage}") else f"{name} (stage {stage})"

"""A section of a comparison's report as plain tables: what page and terminal draw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from thence.compare.result import Arm, Column, Run
from thence.compare.sections import (
    AgainstCovariate,
    AnySection,
    Cost,
    Methods,
    Paper,
    Sensitivity,
    Short,
    TuningTable,
    Verdicts,
    Waterfall,
    arms_of,
    bases_of,
    columns_of,
)
from thence.compare.statistics import Difference, Statistics
from thence.pages.comparison.decided import contrasts_table, turning_table
from thence.pages.comparison.words import (
    STAR,
    amount,
    base_title,
    column_label,
    flops_text,
    label,
    mean_spent,
    points,
    score,
    settings_of,
    settings_text,
    table_note,
    unit,
)
from thence.pages.table import NOTHING, Cell, Table, TableRow


def section_tables(section: AnySection, statistics: Statistics) -> list[Table]:
    """The tables of a section, one a base, and then the paper's own. Sections that are figures alone have none.

    Raises:
        RecipeError: the section names a test set that was not measured.
    """
    if isinstance(section, Verdicts | AgainstCovariate):  # over blocks, not base by base
        is_verdicts = isinstance(section, Verdicts)
        table = contrasts_table(statistics) if is_verdicts else turning_table(section, statistics)
        return [table] if table is not None and table.rows else []
    bases = bases_of(section, statistics.comparison)
    found = [(base, _table(section, statistics, base)) for base in bases]
    tables = [replace(table, title=base_title(statistics, base)) for base, table in found if table and table.rows]
    return tables + ([paper_table(section.paper, statistics)] if section.paper else [])


def _table(section: AnySection, statistics: Statistics, base: str) -> Table | None:
    match section:
        case Methods():
            return _methods(section, statistics, base)
        case Waterfall():
            return _waterfall(section, statistics, base)
        case Sensitivity():
            return (_sweep if section.x else _sensitivity)(section, statistics, base)
        case Cost():
            return _cost(section, statistics, base)
        case Short():
            return _short(section, statistics, base)
        case TuningTable():
            return _tuning(section, statistics, base)
    return None


def paper_table(paper: Paper, statistics: Statistics) -> Table:
    """A paper's own numbers, labelled as such."""
    titles = {arm.name: label(arm) for arm in statistics.comparison.arms}
    digits = [_digits(values[index] for values in paper.rows.values()) for index in range(len(paper.columns))]
    rows = tuple(
        TableRow(titles.get(name, name), tuple(Cell(_written(v, d)) for v, d in zip(values, digits, strict=True)))
        for name, values in paper.rows.items()
    )
    note = "The paper's own numbers, from other models and other data: their level cannot be compared with ours."
    return Table(f"As the paper reports it ({paper.source})", ("", *paper.columns), rows, (note,), paper=True)


def _digits(values: Iterable[float | str]) -> int:
    """Decimals that a column of numbers needs."""
    texts = [f"{value:g}" for value in values if not isinstance(value, str)]
    return max([len(text.partition(".")[2]) for text in texts if "e" not in text] or [0])


def _written(value: float | str, digits: int) -> str:
    if isinstance(value, str):
        return value or "–"
    return f"{value:g}" if "e" in f"{value:g}" else f"{value:.{digits}f}"


def _methods(section: Methods, statistics: Statistics, base: str) -> Table:
    columns, arms = columns_of(section, statistics.comparison), arms_of(section, statistics.comparison)
    published = any(base in arm.paper for arm in arms)
    rows = []
    for arm in arms:
        if not any((arm.name, base, column) in statistics.estimates for column in columns):
            continue
        cells = [_scored(statistics, arm.name, base, column) for column in columns]
        cells += [Cell(f"{arm.paper[base]:.1f}") if base in arm.paper else NOTHING] if published else []
        rows.append(TableRow(label(arm), tuple(cells), arm.group))
    headers = ["", *map(column_label, columns), *(["paper: other models and data"] if published else [])]
    said = ["Numbers of the paper stand there for the reader; their level cannot be compared."] if published else []
    return Table(
        base,
        tuple(headers),
        tuple(rows),
        (table_note(statistics, base), *said, *_missing(statistics, arms, base)),
    )


def _scored(statistics: Statistics, arm: str, base: str, column: Column) -> Cell:
    """Score, and difference to the reference."""
    difference = statistics.differences.get((arm, base, column))
    sub = "reference" if arm == statistics.comparison.reference else points(difference)
    return _cell(statistics, arm, base, column, difference, sub)


def _cell(
    statistics: Statistics, arm: str, base: str, column: Column, difference: Difference | None, sub: str | None = None
) -> Cell:
    estimate = statistics.estimates.get((arm, base, column))
    strong = difference is not None and difference.significant
    return Cell(score(estimate), (points(difference) if sub is None else sub) if estimate else "", strong)


def _to(statistics: Statistics, base: str, column: Column, arms: Sequence[str], other: str) -> dict[str, Difference]:
    """Differences of arms to another, by arm, corrected for their number."""
    found = statistics.pairs(base, column, [(arm, other) for arm in arms if arm != other])
    return {difference.arm: difference for difference in found if difference is not None}


def _waterfall(section: Waterfall, statistics: Statistics, base: str) -> Table:
    columns, arms = columns_of(section, statistics.comparison), arms_of(section, statistics.comparison)
    order = [arm.name for arm in arms]
    clean = section.clean or order[-1]
    headline = columns[0]
    steps = list(zip(order[1:], order[:-1], strict=True))
    above = {d.arm: d for d in statistics.pairs(base, headline, steps) if d is not None}
    to_clean = {column: _to(statistics, base, column, order, clean) for column in columns}
    rows = []
    for arm in arms:
        cells = [
            _cell(
                statistics,
                arm.name,
                base,
                column,
                to_clean[column].get(arm.name),
                "clean" if arm.name == clean else None,
            )
            for column in columns
        ]
        step = above.get(arm.name)
        cells.append(Cell(points(step), strong=step is not None and step.significant) if step else NOTHING)
        rows.append(TableRow(label(arm), tuple(cells)))
    headers = ("", *map(column_label, columns), f"to the row above, {column_label(headline)}")
    return Table(
        base,
        headers,
        tuple(rows),
        (_to_note(statistics, base, clean, "rows"), *_missing(statistics, arms, base)),
    )


def _sensitivity(section: Sensitivity, statistics: Statistics, base: str) -> Table:
    columns, arms = columns_of(section, statistics.comparison), arms_of(section, statistics.comparison)
    other = section.to or statistics.comparison.reference
    differences = {column: _to(statistics, base, column, [a.name for a in arms], other) for column in columns}
    rows = []
    for arm in arms:
        cells = [Cell(settings_of(statistics.comparison.runs_of(arm.name, base)))]
        for column in columns:
            sub = "baseline" if arm.name == other else None
            cells.append(_cell(statistics, arm.name, base, column, differences[column].get(arm.name), sub))
        rows.append(TableRow(label(arm), tuple(cells)))
    headers = ("", "settings", *map(column_label, columns))
    return Table(
        base,
        headers,
        tuple(rows),
        (_to_note(statistics, base, other), *_missing(statistics, arms, base)),
    )


def _to_note(statistics: Statistics, base: str, other: str, of: str = "arms") -> str:
    return (
        f"Accuracy in per cent, mean ± standard deviation over {unit(base)}; second line: difference to "
        f"{label(statistics.comparison.arm(other))}, in points, with its 95% interval. {STAR} and bold: significant "
        f"after Holm's correction for the {of} of this table."
    )


@dataclass(frozen=True)
class SweepLine:
    """Arms of one sweep that differ in what is on the horizontal axis; without a place there: one arm for all x."""

    title: str
    at: tuple[tuple[float | str | None, Arm], ...]


def sweep_lines(section: Sensitivity, statistics: Statistics, base: str) -> list[SweepLine]:
    """The lines of a sweep: one for each fault (and method, where there are several)."""
    arms = arms_of(section, statistics.comparison)
    several = len({arm.method for arm in arms if arm.method}) > 1
    lines: dict[str, list[tuple[float | str | None, Arm]]] = {}
    for arm in arms:
        fault = " and ".join(arm.fault) or "no fault"
        place = _place(section.x, arm, statistics.comparison.runs_of(arm.name, base))
        lines.setdefault(f"{arm.method}: {fault}" if several else fault, []).append((place, arm))
    return [
        SweepLine(title, tuple((None if len(at) == 1 and not arm.fault else place, arm) for place, arm in at))
        for title, at in lines.items()
    ]


def _place(x: str, arm: Arm, runs: list[Run]) -> float | str | None:
    if x == "accumulation":
        return arm.accumulation or None
    return next((run.settings[x] for run in runs if x in run.settings), None)


def sweep_places(lines: Sequence[SweepLine]) -> list[float | str]:
    """The places on the horizontal axis, in order; numbers before words."""
    places = {place for line in lines for place, _ in line.at if place is not None}
    return sorted(places, key=lambda p: (isinstance(p, str), p if isinstance(p, str) else float(p)))  # type: ignore[return-value]


def _sweep(section: Sensitivity, statistics: Statistics, base: str) -> Table:
    column, lines = columns_of(section, statistics.comparison)[0], sweep_lines(section, statistics, base)
    places = sweep_places(lines)
    other = section.to or statistics.comparison.reference
    arms = arms_of(section, statistics.comparison)
    differences = _to(statistics, base, column, [arm.name for arm in arms], other)
    rows = []
    for line in lines:
        held = {place: arm for place, arm in line.at}
        cells = []
        for place in [*places, None]:
            arm = held.get(place)
            sub = "baseline" if arm and arm.name == other else None
            cells.append(_cell(statistics, arm.name, base, column, differences.get(arm.name), sub) if arm else NOTHING)
        rows.append(TableRow(line.title, tuple(cells)))
    headers = ["", *(f"{section.x} = {place:g}" if not isinstance(place, str) else place for place in places), "any"]
    if all(row.cells[-1] == NOTHING for row in rows):
        headers, rows = headers[:-1], [TableRow(row.label, row.cells[:-1]) for row in rows]
    notes = (f"On {column_label(column)}. {_to_note(statistics, base, other)}", *_missing(statistics, arms, base))
    return Table(base, tuple(headers), tuple(rows), notes)


def _cost(section: Cost, statistics: Statistics, base: str) -> Table:
    comparison = statistics.comparison
    reference = mean_spent(comparison.runs_of(comparison.reference, base))["rule_flops"]
    rows = []
    for arm in arms_of(section, comparison):
        runs = comparison.runs_of(arm.name, base)
        if not runs or not (arm.kind or section.arms):
            continue
        spent = mean_spent(runs)
        ratio = spent["rule_flops"] / reference if reference and spent["rule_flops"] is not None else None
        cells = [Cell(amount(spent[name])) for name in ("steps", "trained_tokens", "generated_tokens")]
        cells += [Cell(flops_text(spent["rule_flops"])), Cell("–" if ratio is None else f"{ratio:.2f}")]
        cells += [Cell(flops_text(spent["executed_flops"])), Cell(amount(spent["seconds"]))]
        cells.append(_scored(statistics, arm.name, base, comparison.columns[0]))
        rows.append(TableRow(label(arm), tuple(cells), arm.group))
    headers = ("", "steps", "trained tokens", "generated tokens", "FLOPs, rule", "to reference")
    headers += ("FLOPs, executed", "seconds", column_label(comparison.columns[0]))
    note = (
        f"Means over {unit(base)}, of the whole way from the base, its own training left out. Rule: 6N a trained token "
        "and 2N a generated one. Executed: prompts, attention, output head and scoring passes counted, and skipped "
        "work left out. Seconds are wall time on the machine named below, shared with other runs."
    )
    return Table(base, headers, tuple(rows), (note, table_note(statistics, base)))


def _short(section: Short, statistics: Statistics, base: str) -> Table:
    comparison, columns = statistics.comparison, columns_of(section, statistics.comparison)
    pairs = [(long, short) for short, long in section.pairs]
    found = {column: statistics.pairs(base, column, pairs) for column in columns}
    rows = []
    for index, (long, short) in enumerate(pairs):
        for name in (short, long):
            arm = comparison.arm(name)
            spent = mean_spent(comparison.runs_of(name, base))
            scores = [Cell(score(statistics.estimates.get((name, base, column)))) for column in columns]
            rows.append(TableRow(label(arm), (Cell(flops_text(spent["rule_flops"])), *scores)))
        cells = [Cell(points(d), strong=d is not None and d.significant) for d in (found[c][index] for c in columns)]
        rows.append(TableRow("longer less shorter", (NOTHING, *cells)))
    note = (
        f"Accuracy in per cent, mean ± standard deviation over {unit(base)}; differences in points with their 95% "
        f"intervals. {STAR} and bold: significant after Holm's correction for the pairs of this table."
    )
    named = [comparison.arm(name) for pair in pairs for name in pair]
    headers = ("", "FLOPs, rule", *map(column_label, columns))
    return Table(base, headers, tuple(rows), (note, *_missing(statistics, named, base)))


def _tuning(section: TuningTable, statistics: Statistics, base: str) -> Table:
    rows, edges = [], []
    for arm in arms_of(section, statistics.comparison):
        tries = [t for t in statistics.comparison.tries if (t.arm, t.base) == (arm.name, base)]
        chosen = next((t for t in tries if t.chosen), None)
        if not tries:
            continue
        rest = "; ".join(f"{settings_text(t.settings)}: {100 * t.accuracy:.1f}" for t in tries if not t.chosen)
        done = (settings_text(chosen.settings), f"{100 * chosen.accuracy:.1f}") if chosen else ("not chosen yet", "–")
        rows.append(
            TableRow(label(arm), (Cell(f"{arm.tries}"), Cell(done[0]), Cell(done[1]), Cell(rest or "–")), arm.group)
        )
        if chosen and _at_edge(chosen.settings, [t.settings for t in tries]):
            edges.append(label(arm))
    headers = ("", "settings tried", "chosen", "dev accuracy, %", "others tried: dev accuracy, %")
    tuned = {m.column.split for run in statistics.comparison.tuning_runs for m in run.measured}
    if tuned & {column.split for column in statistics.comparison.columns}:
        where = "Chosen by accuracy on problems that are also reported, so the chosen ones are a little lucky there."
    else:
        where = "Chosen by accuracy on a dev split of its own."
    notes = [f"{where} Tried: with those of the arms before it."]
    if edges:
        notes.append(
            f"Chosen at the edge of what was tried, so that a better value may lie beyond: {', '.join(edges)}."
        )
    return Table(base, headers, tuple(rows), tuple(notes), words=(1, 3))


def _at_edge(chosen: Mapping[str, object], tried: list[Mapping[str, object]]) -> bool:
    """Whether a number among the settings is the smallest or largest of at least three tried."""
    for key, value in chosen.items():
        values = sorted({v for t in tried if isinstance(v := t.get(key), (int, float)) and not isinstance(v, bool)})
        if len(values) >= 3 and value in (values[0], values[-1]):
            return True
    return False


def _missing(statistics: Statistics, arms: Sequence[Arm], base: str) -> list[str]:
    """Which arms have fewer seeds or blocks than planned."""
    comparison = statistics.comparison
    planned = comparison.planned_on(base)
    counts = {label(arm): len(comparison.runs_of(arm.name, base)) for arm in arms}
    short = [f"{name} ({count} of {planned})" for name, count in counts.items() if count < planned]
    what = unit(base).capitalize()
    return [f"{what} finished so far: {', '.join(short)}; all others {planned}."] if short else []

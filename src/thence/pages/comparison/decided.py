"""What a comparison has decided, as tables, words and rows of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from thence.compare.decisions import ERROR, DecidedContrast, Decisions
from thence.compare.result import Column, Comparison
from thence.compare.sections import AgainstCovariate, arms_of, column_named, columns_of
from thence.compare.statistics import Statistics
from thence.compare.turning import Turning, turnings
from thence.files import to_csv
from thence.foreign_text import visible
from thence.pages.comparison.words import column_label, label, signed
from thence.pages.table import NOTHING, Cell, Table, TableRow
from thence.stats.trend import Crossing

PER = 0.1
"""Slopes are said per ten points of the covariate."""
_CSV = ("name", "says", "primary", "kind", "arm", "other", "split", "temperature", "blocks_used", "adjust", "expect")
_CSV += ("equal_within", "blocks_planned", "blocks_finished", "verdict", "estimate", "low", "high", "p", "p_corrected")
_CSV += ("p_equal", "p_equal_corrected", "smallest_p")


def contrasts_table(found: Statistics) -> Table:
    """Every contrast with its verdict, primary ones first."""
    comparison, decisions = found.comparison, found.decisions
    rows = [
        TableRow(
            contrast_title(decision, comparison),
            (_verdict(decision), _size(decision, comparison), _chance(decision), _counted(decision)),
            "Primary" if decision.contrast.primary else "Exploratory",
        )
        for decision in decisions.contrasts
    ]
    return Table("", ("", "verdict", "difference", "p", "blocks"), tuple(rows), tuple(_notes(found)))


def contrast_title(decision: DecidedContrast, comparison: Comparison) -> str:
    """What a contrast says; where it says nothing, its arms."""
    contrast = decision.contrast
    if contrast.says:
        return visible(contrast.says)
    others = [label(comparison.arm(name)) for name in contrast.others]
    other = others[0] if len(others) == 1 else f"the best of {', '.join(others)}"
    return f"{'Slope of ' if contrast.kind == 'slope' else ''}{label(comparison.arm(contrast.arm))} less {other}"


def _size(decision: DecidedContrast, comparison: Comparison) -> Cell:
    where = _test_set(decision.column, comparison)
    if decision.estimate is None:
        return Cell("–", where)
    scale = PER if decision.contrast.kind == "slope" else 1.0
    said = signed(scale * decision.estimate)
    if decision.low is not None and decision.high is not None:
        said += f" [{signed(scale * decision.low)}, {signed(scale * decision.high)}]"
    return Cell(said, where)


def _test_set(column: Column, comparison: Comparison) -> str:
    """A test set, with its temperature where there are several."""
    alone = len({each.temperature for each in comparison.columns}) == 1
    return column.split if alone else column_label(column)


def _chance(decision: DecidedContrast) -> Cell:
    if decision.corrected is None:
        return NOTHING
    equal = "" if decision.corrected_equal is None else f"equal {p_text(decision.corrected_equal)}"
    return Cell(p_text(decision.corrected), equal)


def p_text(p: float) -> str:
    """A p value with two digits that count."""
    return f"{p:.1e}" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _counted(decision: DecidedContrast) -> Cell:
    """How many blocks, and what is done with them."""
    contrast = decision.contrast
    done = "adj." if contrast.degree else "slope" if contrast.kind == "slope" else ""
    part = "" if contrast.blocks == "all" else contrast.blocks.split()[0]
    whole = decision.finished == decision.planned
    count = f"{decision.planned}" if whole else f"{decision.finished}/{decision.planned}"
    return Cell(count, " ".join(filter(None, (part, done))))


def _verdict(decision: DecidedContrast) -> Cell:
    bound = decision.contrast.equal_within
    scale = PER if decision.contrast.kind == "slope" else 1.0
    within = "" if bound is None else f"within ±{100 * scale * bound:.3g}"
    match decision.outcome:
        case "equal":
            return Cell("equal", within, strong=True)
        case "held" | "refuted" as said:
            small = decision.corrected_equal is not None and decision.corrected_equal < ERROR
            return Cell(said, within if small else "", strong=True)
        case "not tested":
            same = decision.finished == decision.planned
            return Cell("not tested", "the covariate is the same in all blocks" if same else "")
    return Cell(decision.outcome)


def _notes(found: Statistics) -> list[str]:
    decisions = found.decisions
    primary = [decision for decision in decisions.contrasts if decision.contrast.primary]
    notes = [
        "Differences in points, mean over blocks (a block is a base with a seed), with 95% intervals that are not "
        "corrected. p is corrected, and that of equality is of a difference as large as the bound. Held, refuted and "
        f"equal: p below {ERROR:g}. Of the {len(primary)} primary contrasts any verdict is wrong with a chance of at "
        "most 5% (Holm); of the verdicts on the others 5% are wrong on average (Benjamini and Hochberg).",
    ]
    if any(d.contrast.kind == "slope" for d in decisions.contrasts):
        notes.append("Slope: points per 10 points of the covariate, tested by its permutation over blocks.")
    if any(d.contrast.kind != "slope" for d in decisions.contrasts):
        adjusted = any(d.contrast.degree for d in decisions.contrasts)
        said = " adj.: what a line or parabola in the covariate explains is taken out." if adjusted else ""
        notes.append(f"Differences are tested by sign flips over blocks.{said}")
    for decision in decisions.contrasts:
        if decision.outcome == "not tested" and decision.finished < decision.planned:
            title = contrast_title(decision, found.comparison)
            said = f"{decision.finished} of {decision.planned} blocks: not tested, since no look was planned"
            notes.append(f"{title}: {said}.")
    count = len(primary)
    smallest = [d.smallest for d in primary if d.smallest is not None and d.smallest * count >= ERROR]
    if smallest:
        notes.append(
            f"So few blocks give no p value below {p_text(max(smallest))}, before correction for {count}: more blocks "
            "are needed to decide anything."
        )
    if (reliability := reliability_note(decisions, found.comparison)) and any(
        d.contrast.kind == "slope" for d in decisions.contrasts
    ):
        notes.append(reliability)
    return notes


def covariate_title(decisions: Decisions, comparison: Comparison) -> str:
    """What the covariate is called."""
    covariate = decisions.covariate
    assert covariate is not None
    column = column_named(covariate.column, comparison)
    return visible(covariate.title) or f"accuracy of {label(comparison.arm(covariate.arm))} on {column_label(column)}"


def reliability_note(decisions: Decisions, comparison: Comparison) -> str:
    """How much of the covariate's spread is its own noise; empty where that cannot be told."""
    if decisions.covariate is None or decisions.reliability is None:
        return ""
    share = f"{100 * decisions.reliability:.0f}%"
    return (
        f"Covariate: {covariate_title(decisions, comparison)}. About {share} of its variance between blocks is not "
        "noise of its measurement (reliability). A slope is flattened to about that share of the true one."
    )


def decided_text(found: Statistics) -> str:
    """The primary verdicts in a sentence; empty where there are none."""
    primary = [decision for decision in found.decisions.contrasts if decision.contrast.primary]
    if not primary:
        return ""
    said = [f"{contrast_title(d, found.comparison)}: {d.outcome}" for d in primary]
    done = sum(d.outcome in ("held", "refuted", "equal") for d in primary)
    return f"{done} of {len(primary)} primary contrasts decided. {'; '.join(said)}."


def of_section(section: AgainstCovariate, found: Statistics) -> list[list[Turning]]:
    """What a section shows: for each column the arms, less the one that it compares them with."""
    comparison, decisions = found.comparison, found.decisions
    if decisions.covariate is None or comparison.is_sealed:
        return []
    other = section.to or comparison.reference
    left_out = {other, *([] if section.arms else [decisions.covariate.arm])}
    arms = [arm.name for arm in arms_of(section, comparison) if arm.name not in left_out]
    columns = columns_of(section, comparison)
    if not section.columns:  # test sets that blocks are told apart by, or arms chosen on, are kept for that
        own = {decisions.covariate.column, *(d.contrast.choose_on for d in decisions.contrasts)}
        kept = {column_named(name, comparison) for name in own}
        columns = [column for column in columns if column not in kept or column == columns[0]]
    of_columns = [turnings(comparison, decisions, arms, other, column, section.bases) for column in columns]
    return [turned for turned in of_columns if turned]


def turning_table(section: AgainstCovariate, found: Statistics) -> Table | None:
    """Slope and crossing of each arm on each column."""
    of_columns = of_section(section, found)
    if not of_columns:
        return None
    comparison = found.comparison
    rows = [
        TableRow(
            label(comparison.arm(turned.arm)),
            (
                Cell(str(len(turned.blocks))),
                Cell(signed(PER * turned.line.slope)) if turned.line and turned.line.slope is not None else NOTHING,
                crossing_cell(turned.line.crossing) if turned.line else NOTHING,
                crossing_cell(turned.monotone.crossing) if turned.monotone else NOTHING,
            ),
            _test_set(turned.column, comparison),
        )
        for column in of_columns
        for turned in column
    ]
    other = label(comparison.arm(section.to or comparison.reference))
    values = list(found.decisions.values.values())
    note = (
        f"Difference to {other} against {covariate_title(found.decisions, comparison)}, over blocks. Slope: points per "
        "10 points of it. Crossing: where the fitted difference is 0, in per cent, and in brackets where its 95% band "
        f"holds 0. Blocks range from {100 * min(values):.0f} to {100 * max(values):.0f}%; nothing is said beyond. The "
        "monotone curve assumes no more than that the difference only rises or only falls; its band is a guide."
    )
    reliability = reliability_note(found.decisions, comparison)
    headers = ("", "blocks", "slope", "crossing, line", "crossing, monotone")
    return Table("", headers, tuple(rows), (note, *([reliability] if reliability else [])))


def crossing_cell(crossing: Crossing) -> Cell:
    """Where a fit crosses zero, or that it does not."""
    span = ", ".join(f"[{low}, {high}]" for low, high in _pieces(crossing))
    if crossing.at is not None:
        return Cell(f"{100 * crossing.at:.0f} {span}".strip())
    return Cell("none in the range", f"not ruled out:\n{span}" if span else "")


def _pieces(crossing: Crossing) -> list[tuple[str, str]]:
    """The ends of each piece of the range in which zero is not ruled out, in per cent."""
    if crossing.low is None or crossing.high is None:
        return []
    pieces = crossing.pieces or ((crossing.low, crossing.high),)
    found = [(f"{100 * low:.0f}", f"{100 * high:.0f}") for low, high in pieces]
    if crossing.open_low:
        found[0] = (f"below {found[0][0]}", found[0][1])
    if crossing.open_high:
        found[-1] = (found[-1][0], f"above {found[-1][1]}")
    return found


def contrast_rows(found: Statistics) -> list[dict[str, Any]]:
    """A row of plain values for each contrast."""
    return [
        {
            **_asked(decision),
            "blocks_planned": decision.planned,
            "blocks_finished": decision.finished,
            "verdict": decision.outcome,
            "estimate": decision.estimate,
            "low": decision.low,
            "high": decision.high,
            "p": decision.p,
            "p_corrected": decision.corrected,
            "p_equal": decision.p_equal,
            "p_equal_corrected": decision.corrected_equal,
            "smallest_p": decision.smallest,
        }
        for decision in found.decisions.contrasts
    ]


def _asked(decision: DecidedContrast) -> dict[str, Any]:
    contrast = decision.contrast
    return {
        "name": contrast.name,
        "says": contrast.says,
        "primary": contrast.primary,
        "kind": contrast.kind,
        "arm": contrast.arm,
        "other": " ".join(contrast.others),
        "split": decision.column.split,
        "temperature": decision.column.temperature,
        "blocks_used": contrast.blocks,
        "adjust": contrast.adjust,
        "expect": contrast.expect,
        "equal_within": contrast.equal_within,
    }


def contrasts_csv(found: Statistics) -> str:
    """One line a contrast."""
    return to_csv(_CSV, contrast_rows(found))


def decided_json(found: Statistics, sections: Sequence[object]) -> dict[str, Any]:
    """Contrasts with their blocks, the covariate, and fits with crossings; empty where nothing is to be decided."""
    content: dict[str, Any] = {}
    if found.decisions.contrasts:
        rows = zip(contrast_rows(found), found.decisions.contrasts, strict=True)
        content["contrasts"] = [row | {"blocks": _blocks(d.differences, d.chosen)} for row, d in rows]
    if (covariate := found.decisions.covariate) is not None:
        values = [{"base": b, "seed": s, "value": value} for (b, s), value in found.decisions.values.items()]
        about = {"arm": covariate.arm, "column": covariate.column, "reliability": found.decisions.reliability}
        content["covariate"] = about | {"blocks": values}
        shown = [section for section in sections if isinstance(section, AgainstCovariate)]
        content["against_covariate"] = [_turned(t) for s in shown for column in of_section(s, found) for t in column]
    return content


def _blocks(differences: Mapping[tuple[str, int], float], chosen: Mapping[tuple[str, int], str]) -> list[dict]:
    return [
        {"base": base, "seed": seed, "difference": value, **({"other": chosen[base, seed]} if chosen else {})}
        for (base, seed), value in differences.items()
    ]


def _turned(turned: Turning) -> dict[str, Any]:
    fits = {}
    for name, trend in (("line", turned.line), ("monotone", turned.monotone)):
        if trend is not None:
            c = trend.crossing
            crossing = {"at": c.at, "low": c.low, "high": c.high, "open_low": c.open_low, "open_high": c.open_high}
            crossing["pieces"] = [list(piece) for piece in c.pieces]
            fits[name] = {"slope": trend.slope, "crossing": crossing}
    about = {"arm": turned.arm, "other": turned.other}
    about |= {"split": turned.column.split, "temperature": turned.column.temperature, "blocks": len(turned.blocks)}
    return about | fits

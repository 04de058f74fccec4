"""The figures of a comparison's report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from thence.compare.result import ALL_BASES, Column
from thence.compare.sections import (
    AgainstCovariate,
    AnySection,
    Dynamics,
    ScoreAgainstFlops,
    Sensitivity,
    Training,
    arms_of,
    column_named,
    columns_of,
)
from thence.compare.statistics import Estimate, Statistics
from thence.pages.comparison.against import against_figure
from thence.pages.comparison.points import Point, along, back, ends_of_axis, label_places, points_of, side_by_side
from thence.pages.comparison.series import UNITS, Series, dynamics_series, quantities_of, training_series
from thence.pages.comparison.tables import sweep_lines, sweep_places
from thence.pages.comparison.words import base_title, column_label, label, unit
from thence.pages.figure import Chart, Figure, Key, Line, colour, hover, line_chart, named, whole, zoom


def section_figures(section: AnySection, statistics: Statistics) -> list[Figure]:
    """The figures of a section, one a base; with many bases one of all, unless the section names its bases.

    Of differences against the covariate there is one, over all blocks.

    Sections that are tables alone, or have nothing to show yet, have none.

    Raises:
        RecipeError: the section names a test set that was not measured.
    """
    if isinstance(section, AgainstCovariate):
        figure = against_figure(section, statistics)
        return [figure] if figure else []
    comparison = statistics.comparison
    bases = section.bases or ([ALL_BASES] if comparison.is_pooled else comparison.bases)
    found = [_figure(section, statistics, base) for base in bases]
    return [figure for figure in found if figure is not None]


def _figure(section: AnySection, statistics: Statistics, base: str) -> Figure | None:
    match section:
        case ScoreAgainstFlops():
            return _score_figure(section, statistics, base)
        case Sensitivity() if section.x:
            return _sweep_figure(section, statistics, base)
        case Training() | Dynamics():
            return _curves_figure(section, statistics, base)
    return None


def _score_figure(section: ScoreAgainstFlops, statistics: Statistics, base: str) -> Figure | None:
    column = column_named(section.column, statistics.comparison)
    points = points_of(section, statistics, base, column)
    if not points:
        return None
    groups = list(dict.fromkeys((point.group, point.colour) for point in points if point.group))
    reference = label(statistics.comparison.arm(statistics.comparison.reference))
    notes = [
        f"Bars: 95% intervals over problems and {unit(base)}. Dashed: {reference}. Points at the same cost stand side "
    ]
    notes[0] += "by side. Overlapping bars do not tell whether a paired difference is significant; the tables do."
    if section.flops == "executed" and len(points) < len(points_of(section, statistics, base, column, known=False)):
        notes.append("Arms whose executed FLOPs cannot be counted are left out.")
    keys = tuple(Key(name, index) for name, index in groups)
    words = f"{column_label(column)}: accuracy against FLOPs, {base_title(statistics, base)}"
    chart = Chart(
        _score_spec(points, statistics.comparison.reference, column, section.flops),
        words,
        max(330, 16 * len(points) + 70),
    )
    return Figure(base_title(statistics, base), (chart,), keys if len(keys) > 1 else (), tuple(notes), wide=True)


def _score_spec(points: Sequence[Point], reference: str, column: Column, flops: str) -> dict[str, Any]:
    """Points with bars, and beside them the arms' names, each at its point's height or as near as there is room."""
    low, high = min(p.low for p in points), max(p.high for p in points)
    pad = 0.04 * (high - low) or 0.02
    bottom, top = 100 * max(0, low - pad), 100 * (high + pad)
    scale, left, right = ends_of_axis([point.flops for point in points])
    offsets = side_by_side(points, scale, left, right)
    places = label_places([(100 * point.mean - bottom) / (top - bottom) for point in points])
    rows = []
    for point, offset, place in zip(points, offsets, places, strict=True):
        row = {"name": point.group, "arm": point.label, "colour": point.colour, "flops": point.flops}
        row |= {"x": back(along(point.flops, scale, left, right) + offset, scale, left, right), "y": 100 * point.mean}
        row |= {"lo": 100 * point.low, "hi": 100 * point.high, "said": f"{100 * point.mean:.1f}  {point.label}"}
        rows.append(row | {"place": bottom + place * (top - bottom), "reference": point.arm == reference})
    x = {"field": "x", "type": "quantitative", "title": f"training FLOPs, {flops}"}
    x |= {"scale": {"type": scale, "domain": [left, right], "nice": False}}
    x |= {"axis": {"format": ".1~e", "grid": False, "tickCount": 5}}
    title = f"accuracy, %, {column_label(column)}"
    y = {"field": "y", "type": "quantitative", "title": title, "scale": {"domain": [bottom, top], "nice": False}}
    used = sorted({point.colour for point in points})
    paint = {"domain": used, "range": [colour(index) for index in used]}
    tooltip = [{"field": "arm"}, {"field": "name", "title": "group"}, {"field": "flops", "format": ".3~e"}]
    tooltip += [{"field": name, "title": said, "format": ".1f"} for name, said in _ENDS]
    marks = {"condition": {"test": "datum.reference", "value": "diamond"}, "value": "circle"}
    sizes = {"condition": {"test": "datum.reference", "value": 110}, "value": 45}
    edge = {"value": "width"}
    layers: list[dict[str, Any]] = [
        {
            "transform": [{"filter": "datum.reference"}],
            "mark": {"type": "rule", "strokeDash": [5, 3], "strokeWidth": 0.8},
            "encoding": {"y": y},
        },
        {
            "mark": {"type": "rule", "strokeWidth": 0.5, "opacity": 0.5},
            "encoding": {"x": x, "y": y, "x2": edge, "y2": {"field": "place"}},
        },
        {"mark": {"type": "rule"}, "encoding": {"x": x, "y": {**y, "field": "lo"}, "y2": {"field": "hi"}}},
        {
            "mark": {"type": "point", "filled": True, "opacity": 1},
            "params": [zoom("x")],  # the names beside the points stay where they are
            "encoding": {"x": x, "y": y, "shape": marks, "size": sizes},
        },
        {
            "mark": {"type": "text", "align": "left", "dx": 6, "fontSize": 11, "clip": False},
            "encoding": {"x": edge, "y": {**y, "field": "place"}, "text": {"field": "said"}},
        },
        hover(tooltip),
    ]
    layers[-1]["encoding"] |= {"x": x, "y": y}
    encoding = {"color": {"field": "colour", "type": "nominal", "scale": paint, "legend": None}}
    spec = {"data": {"values": rows}, "encoding": encoding, "layer": layers}
    return whole(spec)


_ENDS = (("y", "accuracy, %"), ("lo", "from"), ("hi", "to"))


def _sweep_figure(section: Sensitivity, statistics: Statistics, base: str) -> Figure | None:
    column, lines = columns_of(section, statistics.comparison)[0], sweep_lines(section, statistics, base)
    places = sweep_places(lines)
    measured = [line for line in lines if any((a.name, base, column) in statistics.estimates for _, a in line.at)]
    if not places or not measured:
        return None
    names = [place if isinstance(place, str) else f"{place:g}" for place in places]
    keys = tuple(Key.of(line.title, index) for index, line in enumerate(measured))
    rows, everywhere = [], []
    for line in measured:
        held = {place: statistics.estimates.get((arm.name, base, column)) for place, arm in line.at}
        if (found := held.get(None)) is not None:
            everywhere.append({"name": line.title, **_ends(found)})
        at = sorted((places.index(place), e) for place, e in held.items() if place is not None and e is not None)
        rows += [{"name": line.title, "x": names[place], **_ends(e)} for place, e in at]
    x = {"field": "x", "type": "ordinal", "sort": names, "title": section.x, "scale": {"domain": names}}
    x |= {"axis": {"labelAngle": 0, "grid": False}}
    y = {"field": "y", "type": "quantitative", "title": f"accuracy, %, {column_label(column)}", "scale": _FREE}
    low = {"y": {**y, "field": "lo"}, "y2": {"field": "hi"}}
    beside = {"xOffset": {"field": "name", "type": "nominal", "sort": [key.name for key in keys]}}
    tooltip = [{"field": "name", "title": "line"}, {"field": "x", "title": section.x}]
    tooltip += [{"field": name, "title": said, "format": ".1f"} for name, said in _ENDS]
    flat, points = {"data": {"values": everywhere}}, {"data": {"values": rows}}
    layers: list[dict[str, Any]] = [
        {**flat, "mark": {"type": "rect", "opacity": 0.12}, "encoding": {**low, "strokeDash": None}},
        {**flat, "mark": "rule", "encoding": {"y": y, "tooltip": [tooltip[0], *tooltip[2:]]}},
        {**points, "mark": {"type": "line", "strokeWidth": 1.2}, "encoding": {"x": x, "y": y, **beside}},
        {**points, "mark": "rule", "encoding": {"x": x, **low, **beside, "strokeDash": {"value": []}}},
        {
            **points,
            "mark": {"type": "point", "filled": True, "size": 40, "opacity": 1},
            "params": [zoom("y")],
            "encoding": {"x": x, "y": y, **beside, "tooltip": tooltip},
        },
    ]
    words = f"{column_label(column)}: accuracy by {section.x}, {base_title(statistics, base)}"
    spec = {"encoding": named(keys), "layer": [layer for layer in layers if layer["data"]["values"]]}
    note = f"Bars and band: 95% intervals over problems and {unit(base)}."
    return Figure(base_title(statistics, base), (Chart(whole(spec), words, 320),), keys, (note,))


_FREE = {"zero": False}


def _ends(estimate: Estimate) -> dict[str, float]:
    return {"y": 100 * estimate.mean, "lo": 100 * estimate.low, "hi": 100 * estimate.high}


def _curves_figure(section: Training | Dynamics, statistics: Statistics, base: str) -> Figure | None:
    """Panels side by side, a quantity each, a line an arm."""
    comparison = statistics.comparison
    draw = training_series if isinstance(section, Training) else dynamics_series
    arms = arms_of(section, comparison)
    panels: dict[str, list[tuple[int, Series]]] = {}
    for quantity in quantities_of(section):
        held = [(i, s) for i, arm in enumerate(arms) if (s := draw(section, comparison, arm, base, quantity))]
        if held:
            panels[quantity] = held
    if not panels:
        return None
    shown = sorted({index for held in panels.values() for index, _ in held})
    names = [label(arm) for arm in arms]
    apart = [f"{name} ({arm.name})" if names.count(name) > 1 else name for name, arm in zip(names, arms, strict=True)]
    keys = {index: Key.of(apart[index], index) for index in shown}
    charts = tuple(
        line_chart(
            [_line(keys[index].name, series, section.kind == "dynamics") for index, series in held],
            [keys[index] for index, _ in held],
            UNITS[quantity],
            f"{UNITS[quantity]} by step, {base_title(statistics, base)}",
            height=270,
        )
        for quantity, held in panels.items()
    )
    blocks = sorted({block for held in panels.values() for _, series in held for block in series.blocks})
    note = _whose(blocks, base, isinstance(section, Training))
    smooth = f" Each point is the mean of {section.smooth} steps." if section.smooth > 1 else ""
    return Figure(base_title(statistics, base), charts, tuple(keys.values()), (note + smooth,))


def _whose(blocks: Sequence[tuple[str, int]], base: str, single: bool) -> str:
    """Whose curves a figure shows. ``single``: one run's, not a mean."""
    if base == ALL_BASES:
        named = "; ".join(f"{name}, seed {seed}" for name, seed in blocks)
        return f"From {named}." if single else f"Mean and range over {len(blocks)} blocks, as far as all went."
    said = ", ".join(str(seed) for _, seed in blocks)
    return f"Seed {said}." if single else f"Mean and range over seeds {said}, as far as all went."


def _line(name: str, series: Series, band: bool) -> Line:
    return Line(name, series.steps, series.mean, series.low if band else None, series.high if band else None)

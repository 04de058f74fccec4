"""The figure of differences against the covariate: blocks, a line with its band, a monotone curve, and crossings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from thence.compare.sections import LINES, AgainstCovariate
from thence.compare.statistics import Statistics
from thence.compare.turning import Turning
from thence.pages.comparison.decided import covariate_title, of_section
from thence.pages.comparison.words import column_label, label
from thence.pages.figure import Chart, Figure, Key, hover, named, whole, zoom
from thence.stats.trend import Trend

_HEIGHT = 320


def against_figure(section: AgainstCovariate, found: Statistics) -> Figure | None:
    """A panel a column, a colour an arm; None where there is no block yet."""
    of_columns = of_section(section, found)
    if not of_columns:
        return None
    comparison = found.comparison
    arms = list(dict.fromkeys(turned.arm for column in of_columns for turned in column))
    drawn = arms if section.arms else arms[:LINES]
    keys = {name: Key.of(label(comparison.arm(name)), index) for index, name in enumerate(drawn)}
    other = label(comparison.arm(section.to or comparison.reference))
    x = covariate_title(found.decisions, comparison)
    charts = []
    for column in of_columns:
        shown = [turned for turned in column if turned.arm in keys]
        if shown:
            words = f"{column_label(shown[0].column)}: difference to {other} against {x}"
            charts.append(Chart(_spec(shown, keys, f"{x}, %", f"less {other}, points"), words, _HEIGHT, words))
    notes = [
        "Points: blocks. Line and band: a straight line with its 95% band (bootstrap over blocks). Dashed: a monotone "
        "curve. Tick: where the line crosses 0, with the range in which a difference of 0 is not ruled out."
    ]
    if len(drawn) < len(arms):
        notes.append(f"The first {LINES} arms are drawn; the table has all.")
    return Figure("", tuple(charts), tuple(keys.values()), tuple(notes))


def _spec(shown: Sequence[Turning], keys: dict[str, Key], x_title: str, y_title: str) -> dict[str, Any]:
    rows = [row for turned in shown for row in _rows(turned, keys[turned.arm].name)]
    x = {"field": "x", "type": "quantitative", "title": x_title, "scale": {"zero": False, "nice": False, "padding": 8}}
    x |= {"axis": {"grid": False, "tickCount": 6}}
    y = {"field": "y", "type": "quantitative", "title": y_title, "axis": {"tickCount": 6}}
    solid = {"strokeDash": {"value": []}}
    tooltip = [{"field": "name", "title": "arm"}, {"field": "block"}]
    tooltip += [{"field": "x", "title": "covariate, %", "format": ".1f"}]
    tooltip += [{"field": "y", "title": "difference, points", "format": "+.1f"}]
    crossing = [{"field": "name", "title": "arm"}, {"field": "x", "title": "crosses 0 at, %", "format": ".1f"}]
    crossing += [{"field": "lo", "title": "from", "format": ".1f"}, {"field": "hi", "title": "to", "format": ".1f"}]
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": [{"y": 0}]},
            "mark": {"type": "rule", "strokeWidth": 1},
            "encoding": {"y": y, "color": {"value": "var(--soft)"}, **solid},
        },
        _layer(
            "line",
            {"type": "area", "opacity": 0.14},
            {"x": x, "y": {**y, "field": "lo"}, "y2": {"field": "hi"}, "strokeDash": None},
        ),
        {**_layer("line", {"type": "line", "strokeWidth": 1.6}, {"x": x, "y": y, **solid}), "params": [zoom()]},
        _layer("monotone", {"type": "line", "strokeWidth": 1}, {"x": x, "y": y, "strokeDash": {"value": [3, 3]}}),
        _layer("block", {"type": "point", "filled": True, "size": 22, "opacity": 0.7}, {"x": x, "y": y}),
        _layer(
            "crossing",
            {"type": "rule", "strokeWidth": 4, "opacity": 0.5},
            {"x": {**x, "field": "lo"}, "x2": {"field": "hi"}, "y": y, "tooltip": crossing, **solid},
        ),
        _layer("at", {"type": "tick", "thickness": 3, "size": 16}, {"x": x, "y": y, "tooltip": crossing}),
        hover(tooltip),
    ]
    layers[-1] |= {"transform": [{"filter": "datum.part == 'block'"}]}
    layers[-1]["encoding"] |= {"x": x, "y": y}
    return whole({"data": {"values": rows}, "encoding": named(list(keys.values())), "layer": layers})


def _layer(part: str, mark: dict[str, Any], encoding: dict[str, Any]) -> dict[str, Any]:
    """The marks of one kind of row."""
    return {"transform": [{"filter": f"datum.part == '{part}'"}], "mark": mark, "encoding": encoding}


def _rows(turned: Turning, name: str) -> list[dict[str, Any]]:
    found = zip(turned.blocks, turned.covariate, turned.differences, strict=True)
    rows: list[dict[str, Any]] = [
        {"name": name, "part": "block", "block": f"{base}, seed {seed}", "x": 100 * z, "y": 100 * d}
        for (base, seed), z, d in found
    ]
    if turned.line is not None:
        rows += _fitted(turned.line, name, "line")
        c = turned.line.crossing
        for low, high in c.pieces:
            ends, at = {"lo": 100 * low, "hi": 100 * high, "y": 0}, None if c.at is None else 100 * c.at
            rows.append({"name": name, "part": "crossing", "x": at, **ends})
            if c.at is not None and low <= c.at <= high:
                rows.append({"name": name, "part": "at", "x": at, **ends})
    if turned.monotone is not None:
        rows += _fitted(turned.monotone, name, "monotone")
    return rows


def _fitted(trend: Trend, name: str, part: str) -> list[dict[str, Any]]:
    found = zip(trend.places, trend.fit, trend.low, trend.high, strict=True)
    return [
        {"name": name, "part": part, "x": 100 * x, "y": 100 * y, "lo": 100 * low, "hi": 100 * high}
        for x, y, low, high in found
    ]

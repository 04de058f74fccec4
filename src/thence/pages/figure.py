"""Figures as Vega-Lite specifications, in the page's own colours; Vega draws them in the reader's browser.

A specification names colours as the variables of ``base.html``, so that a change from light to dark needs no new
drawing. ``scripts/charts.js`` hands it to Vega and switches lines off and on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thence.foreign_text import visible

DASHES: tuple[tuple[int, ...], ...] = ((), (6, 3), (2, 2))
"""Of the first, second and third line of a colour."""
BORDERS = ("solid", "dashed", "dotted")
"""The same as CSS names for a border."""
_MOST_POINTS = 600
"""Points of a line that are drawn; a longer one is drawn as means of several steps each."""
_ZOOM = "wheel![event.ctrlKey || event.metaKey]"


@dataclass(frozen=True)
class Palette:
    """Colours of text (``ink``, ``soft``), lines (``faint``), areas (``paper``, ``wash``) and series in their order."""

    ink: str
    soft: str
    faint: str
    paper: str
    wash: str
    series: tuple[str, ...]


LIGHT = Palette(
    ink="#1d1f21",
    soft="#5d6166",
    faint="#d9d9d4",
    paper="#fdfdfb",
    wash="#f2f2ee",
    series=("#1f5f99", "#b3541e", "#1c6b3c", "#8a3ea8", "#a4282c", "#7a5b00", "#0e7c86", "#5d6166"),
)
DARK = Palette(
    ink="#dfe1e2",
    soft="#9aa0a6",
    faint="#34383c",
    paper="#16181a",
    wash="#1f2326",
    series=("#74b0e8", "#e8935a", "#6cc48f", "#c79be6", "#ef8386", "#d8b65a", "#5cc3cc", "#9aa0a6"),
)
COLOURS = len(LIGHT.series)


@dataclass(frozen=True)
class Key:
    """What a line means: its name, its colour (index of the page's series) and its dash (index of DASHES)."""

    name: str
    colour: int
    dash: int = 0

    @classmethod
    def of(cls, name: str, index: int) -> Key:
        """The key of the line of this index: colours first, then dashes."""
        return cls(name, index % COLOURS, index // COLOURS % len(DASHES))


@dataclass(frozen=True)
class Chart:
    """One panel.

    Args:
        spec: Vega-Lite; its lines have names in the field ``name``.
        words: what it shows, for those who cannot see it.
        height: of the drawing with its axes, CSS pixels.
        title, last: above it: the quantity, and its last value.
    """

    spec: Mapping[str, Any]
    words: str
    height: int
    title: str = ""
    last: str = ""


@dataclass(frozen=True)
class Figure:
    """Panels that share their keys: heading, panels, keys (each switches a line off and on in all panels), notes.

    Args:
        wide: the panels are not made narrower than their labels allow; a narrow screen moves them sideways.
    """

    title: str
    charts: tuple[Chart, ...]
    keys: tuple[Key, ...] = ()
    notes: tuple[str, ...] = ()
    wide: bool = False


@dataclass(frozen=True)
class Line:
    """One line of a chart: its name, its points, and where known the ends of a band around them."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def line_chart(lines: Sequence[Line], keys: Sequence[Key], unit: str, words: str, **about: Any) -> Chart:
    """Lines over steps: point at one to read it, drag to move, zoom with Ctrl and the wheel or with the buttons.

    Args:
        lines: at least one with a point; the names are those of keys.
        keys: colour and dash of every line.
        unit: of the vertical axis.
        words: what the chart shows.
        about: other fields of :class:`Chart`.
    """
    thinned = [_thinned(line) for line in lines]
    rows = [row for line in thinned for row in _rows(line)]
    banded = any(line.low is not None for line in thinned)
    x = {"field": "x", "type": "quantitative", "title": "step", "scale": {"zero": False, "nice": False}}
    x["axis"] = {"tickMinStep": 1, "tickCount": 5, "grid": False}
    scale = _flat([row["y"] for row in rows]) or {"zero": False, "nice": True}
    y = {"field": "y", "type": "quantitative", "title": unit, "scale": scale, "axis": {"tickCount": 5}}
    tooltip = [{"field": "name", "title": "line"}, {"field": "x", "title": "step"}]
    tooltip += [{"field": "y", "title": unit, "format": ".4~g"}]
    if banded:
        tooltip += [{"field": end, "title": title, "format": ".4~g"} for end, title in (("lo", "from"), ("hi", "to"))]
    layers: list[dict[str, Any]] = []
    if banded:
        band = {"y": {**y, "field": "lo"}, "y2": {"field": "hi"}, "strokeDash": None}
        layers.append({"mark": {"type": "area", "opacity": 0.14}, "encoding": band})
    dotted = {"point": {"size": 14, "filled": True}} if max(len(line.x) for line in thinned) < 3 else {}
    layers.append({"mark": {"type": "line", "strokeWidth": 1.4, **dotted}, "params": [zoom()], "encoding": {"y": y}})
    layers.append(hover(tooltip))
    layers[-1]["encoding"]["y"] = y
    spec = {"data": {"values": rows}, "encoding": {"x": x, **named(keys)}, "layer": layers}
    return Chart(whole(spec), words, about.pop("height", 190), **about)


def zoom(*encodings: str) -> dict[str, Any]:
    """The parameter that binds a chart's axes to dragging and zooming; it stands in one layer."""
    select = {"type": "interval", "encodings": list(encodings or ("x", "y")), "zoom": _ZOOM}
    return {"name": "zoom", "select": select, "bind": "scales"}


def hover(tooltip: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The layer of points that appear, with their figures, near the pointer; the caller adds the vertical axis."""
    near = {"type": "point", "on": "pointermove", "nearest": True, "clear": "pointerout"}
    shown = {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0}
    return {
        "mark": {"type": "point", "filled": True, "size": 45},
        "params": [{"name": "near", "select": near}],
        "encoding": {"opacity": shown, "tooltip": list(tooltip)},
    }


def whole(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A specification with what all charts share; what others wrote in it can be seen and does nothing."""
    off = {"name": "off", "value": []}
    shared = {
        "width": "container",
        "height": "container",
        "autosize": {"type": "fit", "contains": "padding"},
        "params": [off, *spec.get("params", ())],
        "transform": [{"filter": "indexof(off, datum.name) < 0"}, *spec.get("transform", ())],
        "config": CONFIG,
    }
    return _visible({**spec, **shared})


def still(spec: Mapping[str, Any], palette: Palette) -> dict[str, Any]:
    """A specification for a picture: in the colours of a palette, without what answers to a pointer."""
    names = {f"var(--{name})": getattr(palette, name) for name in ("ink", "soft", "faint", "paper", "wash")}
    names |= {f"var(--series-{index})": colour for index, colour in enumerate(palette.series)}
    layers = [
        {key: value for key, value in layer.items() if key != "params"}
        for layer in spec["layer"]
        if not any(param["name"] == "near" for param in layer.get("params", ()))
    ]
    left_out = ("params", "transform", "autosize")
    return _replaced({**{key: value for key, value in spec.items() if key not in left_out}, "layer": layers}, names)


def colour(index: int) -> str:
    """A colour of the series as a style sheet names it."""
    return f"var(--series-{index % COLOURS})"


def named(keys: Sequence[Key]) -> dict[str, Any]:
    """Colour and dash by name; the keys stand beside the chart, where they can be pressed."""
    names = [key.name for key in keys]
    colours = {"domain": names, "range": [colour(key.colour) for key in keys]}
    dashes = {"domain": names, "range": [list(DASHES[key.dash]) for key in keys]}
    return {
        "color": {"field": "name", "type": "nominal", "scale": colours, "legend": None},
        "strokeDash": {"field": "name", "type": "nominal", "scale": dashes, "legend": None},
    }


def _rows(line: Line) -> Iterable[dict[str, Any]]:
    for index, (x, y) in enumerate(zip(line.x, line.y, strict=True)):
        row: dict[str, Any] = {"name": line.name, "x": x, "y": y}
        if line.low is not None and line.high is not None:
            row |= {"lo": line.low[index], "hi": line.high[index]}
        yield row


def steps_a_point(length: int) -> int:
    """How many steps a drawn point stands for in a line of this many."""
    return -(-length // _MOST_POINTS)


def _thinned(line: Line) -> Line:
    """The line as means of several steps, if it has too many; the ends of its band keep their extremes."""
    size = steps_a_point(len(line.x))
    if size <= 1:
        return line

    def parts(values: Sequence[float]) -> list[Sequence[float]]:
        return [values[start : start + size] for start in range(0, len(values), size)]

    low = None if line.low is None else [min(part) for part in parts(line.low)]
    high = None if line.high is None else [max(part) for part in parts(line.high)]
    x, y = ([sum(part) / len(part) for part in parts(values)] for values in (line.x, line.y))
    return Line(line.name, x, y, low, high)


def _flat(values: Sequence[float]) -> dict[str, Any] | None:
    """The scale of a flat line, which is not noise blown up to the height of the chart."""
    if min(values) != max(values):
        return None
    low, high = sorted((0.0, 1.5 * values[0] or 1.0))
    return {"domain": [low, high], "nice": False}


def _visible(value: Any) -> Any:
    """Text of others as a page shows it, wherever it stands in a specification."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {key: _visible(held) for key, held in value.items()}
    return [_visible(held) for held in value] if isinstance(value, list | tuple) else value


def _replaced(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, Mapping):
        return {key: _replaced(held, names) for key, held in value.items()}
    return [_replaced(held, names) for held in value] if isinstance(value, list | tuple) else value


_FONT = "system-ui, -apple-system, Segoe UI, Roboto, Noto Sans, sans-serif"
CONFIG: Mapping[str, Any] = {
    "font": _FONT,
    "background": None,
    "aria": False,  # the label of the box says what is drawn
    "view": {"stroke": None, "cursor": "crosshair"},
    "axis": {
        "labelColor": "var(--ink)",
        "titleColor": "var(--ink)",
        "titleFontWeight": "normal",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "gridColor": "var(--faint)",
        "gridWidth": 0.6,
        "domainColor": "var(--faint)",
        "ticks": False,
        "labelPadding": 4,
        "labelLimit": 260,
    },
    "axisY": {"domain": False},
}
"""The look of all charts: a faint grid, a base line, no frame."""

"""The figures of a comparison's report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from thence.compare.result import Column
from thence.compare.sections import (
    AnySection,
    Dynamics,
    ScoreAgainstFlops,
    Sensitivity,
    Training,
    arms_of,
    column_named,
    columns_of,
)
from thence.compare.statistics import Statistics
from thence.pages.comparison.points import Point, along, back, ends_of_axis, label_places, points_of, side_by_side
from thence.pages.comparison.series import Series, dynamics_series, quantities_of, training_series, unit_of
from thence.pages.comparison.tables import SweepLine, sweep_lines, sweep_places
from thence.pages.comparison.words import column_label, label
from thence.pages.figure import (
    LIGHT,
    PAGE,
    Figure,
    Key,
    Palette,
    canvas,
    drawing_settings,
    inline,
    plain_axes,
    write_png,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 9.4


def section_figures(section: AnySection, statistics: Statistics) -> list[Figure]:
    """The figures of a section, one a base. Sections that are tables alone, or have nothing to show yet, have none.

    Raises:
        RecipeError: the section names a test set that was not measured.
    """
    bases = section.bases or statistics.comparison.bases
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


def score_against_flops_png(
    statistics: Statistics, path: Path, bases: Sequence[str] = (), arms: Sequence[str] = ()
) -> None:
    """One picture for a README: score over FLOPs by the rule, a panel for each base.

    Args:
        path: the PNG file to write.
        bases, arms: which; empty: all.

    Raises:
        ValueError: no run of them has finished.
    """
    import matplotlib
    from matplotlib.lines import Line2D

    section = ScoreAgainstFlops(kind="score-against-flops", arms=list(arms), bases=list(bases))
    column = statistics.comparison.columns[0]
    held = {base: points_of(section, statistics, base, column) for base in bases or statistics.comparison.bases}
    held = {base: points for base, points in held.items() if points}
    if not held:
        raise ValueError("no finished run to draw")
    heights = [_height(points) for points in held.values()]
    with matplotlib.rc_context(drawing_settings("png")):
        longest = max(_labels(points) for points in held.values())
        figure = canvas(_WIDTH, sum(heights) + 0.5, right=longest, below=1.0, above=0.3)
        panels = figure.subplots(len(held), 1, squeeze=False, height_ratios=heights)[:, 0]
        axes = panels[-1]
        for axes, (base, points) in zip(panels, held.items(), strict=True):
            _draw_scores(axes, points, statistics.comparison.reference, LIGHT, column, "rule")
            axes.set_title(base, loc="left", color=LIGHT.ink)
        axes.set_xlabel(f"{axes.get_xlabel()}; bars are 95% intervals over problems and seeds")
        groups = dict((point.group, point.colour) for points in held.values() for point in points if point.group)
        if len(groups) > 1:
            marks = [Line2D([], [], color=LIGHT.line(c)[0], marker="o", markersize=4) for c in groups.values()]
            figure.legend(marks, list(groups), loc="lower left", ncols=3, frameon=False, labelcolor=LIGHT.ink)
        write_png(figure, path, LIGHT)


def _score_figure(section: ScoreAgainstFlops, statistics: Statistics, base: str) -> Figure | None:
    import matplotlib

    column = column_named(section.column, statistics.comparison)
    points = points_of(section, statistics, base, column)
    if not points:
        return None
    with matplotlib.rc_context(drawing_settings(f"score-{base}")):
        figure = canvas(_WIDTH, _height(points), right=_labels(points))
        _draw_scores(figure.subplots(), points, statistics.comparison.reference, PAGE, column, section.flops)
        svg = inline(figure, f"{column_label(column)}: accuracy against FLOPs on {base}")
    groups = list(dict.fromkeys((point.group, point.colour) for point in points if point.group))
    reference = label(statistics.comparison.arm(statistics.comparison.reference))
    notes = [f"Bars: 95% intervals over problems and seeds. Dashed: {reference}. Points at the same cost stand side "]
    notes[0] += "by side. Overlapping bars do not tell whether a paired difference is significant; the tables do."
    if section.flops == "executed" and len(points) < len(points_of(section, statistics, base, column, known=False)):
        notes.append("Arms whose executed FLOPs cannot be counted are left out.")
    keys = tuple(Key(name, colour % len(PAGE.series), 0) for name, colour in groups)
    return Figure(base, svg, keys if len(keys) > 1 else (), tuple(notes))


def _height(points: Sequence[Point]) -> float:
    return max(3.2, 0.185 * len(points) + 0.9)


def _labels(points: Sequence[Point]) -> float:
    """Inches that the labels beside the axes take."""
    return min(0.5 * _WIDTH, 0.25 + 0.066 * max(len(point.label) + 6 for point in points))


def _draw_scores(
    axes: Axes, points: Sequence[Point], reference: str, palette: Palette, column: Column, flops: str
) -> None:
    from matplotlib.collections import LineCollection

    plain_axes(axes, palette, f"training FLOPs, {flops}", f"accuracy, %, {column_label(column)}")
    low, high = min(p.low for p in points), max(p.high for p in points)
    pad = 0.04 * (high - low) or 0.02
    axes.set_ylim(100 * max(0, low - pad), 100 * (high + pad))
    scale, left, right = ends_of_axis([point.flops for point in points])
    axes.set_xscale(scale)
    axes.set_xlim(left, right)
    offsets = side_by_side(points, scale, left, right)
    bottom, top = axes.get_ylim()
    heights = [(100 * point.mean - bottom) / (top - bottom) for point in points]
    across = [along(point.flops, scale, left, right) + offset for point, offset in zip(points, offsets, strict=True)]
    colours = [palette.series[point.colour % len(palette.series)] for point in points]
    places = label_places(heights)
    leaders = [((x, y), (1.02, place)) for x, y, place in zip(across, heights, places, strict=True)]
    style = {"colors": colours, "linewidths": 0.4, "alpha": 0.6, "clip_on": False}
    axes.add_collection(LineCollection(leaders, transform=axes.transAxes, **style), autolim=False)
    for point, x, place, colour in zip(points, across, places, colours, strict=True):
        bars = [[100 * (point.mean - point.low)], [100 * (point.high - point.mean)]]
        is_reference = point.arm == reference
        marker = {"marker": "D", "markersize": 6} if is_reference else {"marker": "o", "markersize": 4}
        at = back(x, scale, left, right)
        axes.errorbar(at, 100 * point.mean, yerr=bars, color=colour, elinewidth=1, linestyle="none", **marker)
        words = f"{100 * point.mean:.1f}  {point.label}"
        axes.text(1.025, place, words, transform=axes.transAxes, va="center", fontsize=8, color=colour)
        if is_reference:
            axes.axhline(100 * point.mean, color=colour, linewidth=0.8, linestyle=(0, (5, 3)), zorder=1)


def _sweep_figure(section: Sensitivity, statistics: Statistics, base: str) -> Figure | None:
    import matplotlib

    column, lines = columns_of(section, statistics.comparison)[0], sweep_lines(section, statistics, base)
    places = sweep_places(lines)
    measured = [line for line in lines if any((a.name, base, column) in statistics.estimates for _, a in line.at)]
    if not places or not measured:
        return None
    with matplotlib.rc_context(drawing_settings(f"sweep-{section.x}-{base}")):
        figure = canvas(6.4, 3.2)
        axes = figure.subplots()
        plain_axes(axes, PAGE, section.x, f"accuracy, %, {column_label(column)}")
        for index, line in enumerate(measured):
            _draw_line(axes, line, index, places, statistics, base, column)
        axes.set_xticks(range(len(places)), [p if isinstance(p, str) else f"{p:g}" for p in places])
        axes.set_xlim(-0.3, len(places) - 0.7)
        svg = inline(figure, f"{column_label(column)}: accuracy by {section.x} on {base}")
    keys = tuple(Key.of(line.title, index) for index, line in enumerate(measured))
    return Figure(base, svg, keys, ("Bars and band: 95% intervals over problems and seeds.",), narrow=True)


def _draw_line(
    axes: Axes, line: SweepLine, index: int, places: list, statistics: Statistics, base: str, column: Column
) -> None:
    colour, dash = PAGE.line(index)
    held = {place: statistics.estimates.get((arm.name, base, column)) for place, arm in line.at}
    everywhere = held.get(None)
    if everywhere is not None:
        axes.axhline(100 * everywhere.mean, color=colour, linestyle=dash, linewidth=1.2)
        axes.axhspan(100 * everywhere.low, 100 * everywhere.high, color=colour, alpha=0.12, linewidth=0)
    at = sorted((places.index(place), e) for place, e in held.items() if place is not None and e is not None)
    if not at:
        return
    xs = [x + 0.03 * (index - 2) for x, _ in at]
    ys = [100 * e.mean for _, e in at]
    bars = [[100 * (e.mean - e.low) for _, e in at], [100 * (e.high - e.mean) for _, e in at]]
    axes.errorbar(xs, ys, yerr=bars, color=colour, linestyle=dash, linewidth=1.2, elinewidth=0.9, marker="o", ms=4)


def _curves_figure(section: Training | Dynamics, statistics: Statistics, base: str) -> Figure | None:
    """Panels side by side, a quantity each, a line an arm."""
    import matplotlib
    from matplotlib.ticker import MaxNLocator

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
    with matplotlib.rc_context(drawing_settings(f"{section.kind}-{base}-{'-'.join(panels)}")):
        figure = canvas(_WIDTH, 2.7 if len(panels) > 1 else 3.2)
        drawn = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (quantity, held) in zip(drawn, panels.items(), strict=True):
            plain_axes(axes, PAGE, "step", unit_of(quantity))
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            for index, series in held:
                colour, dash = PAGE.line(index)
                axes.plot(series.steps, series.mean, color=colour, linestyle=dash, linewidth=1.2)
                if section.kind == "dynamics":
                    band = {"color": colour, "alpha": 0.13, "linewidth": 0}
                    axes.fill_between(series.steps, series.low, series.high, **band)
        svg = inline(figure, f"{', '.join(map(unit_of, panels))} by step on {base}")
    shown = sorted({index for held in panels.values() for index, _ in held})
    seeds = sorted({seed for held in panels.values() for _, series in held for seed in series.seeds})
    said = ", ".join(map(str, seeds))
    note = (
        f"Seed {said}." if isinstance(section, Training) else f"Mean and range over seeds {said}, as far as all went."
    )
    smooth = f" Each point is the mean of {section.smooth} steps." if section.smooth > 1 else ""
    keys = tuple(Key.of(label(arms[index]), index) for index in shown)
    return Figure(base, svg, keys, (note + smooth,))

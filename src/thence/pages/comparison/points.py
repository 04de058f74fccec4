"""The points of score against FLOPs: where they are, and where their labels go so that none covers another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from thence.compare.result import Column
from thence.compare.sections import ScoreAgainstFlops, arms_of
from thence.compare.statistics import Statistics
from thence.pages.comparison.words import label, mean_spent

_FAR = 50.0
"""Ratio of the largest cost to the smallest from which the axis is logarithmic."""


@dataclass(frozen=True)
class Point:
    """An arm: mean FLOPs over seeds, accuracy and interval (shares), and the index of its group's colour."""

    arm: str
    label: str
    group: str
    colour: int
    flops: float
    mean: float
    low: float
    high: float


def points_of(
    section: ScoreAgainstFlops, statistics: Statistics, base: str, column: Column, known: bool = True
) -> list[Point]:
    """The measured arms of a section on a base; those of unknown cost only where ``known`` is false, at 0."""
    comparison = statistics.comparison
    groups = list(dict.fromkeys(arm.group for arm in comparison.arms))
    found = []
    for arm in arms_of(section, comparison):
        estimate = statistics.estimates.get((arm.name, base, column))
        cost = mean_spent(comparison.runs_of(arm.name, base))[f"{section.flops}_flops"]
        if estimate is not None and (cost is not None or not known):
            place = (arm.name, label(arm), arm.group, groups.index(arm.group))
            found.append(Point(*place, cost or 0.0, estimate.mean, estimate.low, estimate.high))
    return found


def ends_of_axis(flops: Sequence[float]) -> tuple[str, float, float]:
    """Scale of the axis (linear or log), and its ends. What costs nothing stands at the left end of a log axis."""
    most, positive = max(flops), [value for value in flops if value > 0]
    if positive and most / min(positive) > _FAR:
        return "log", min(positive) / (3 if 0 in flops else 1.5), most * 2
    return "linear", -0.06 * most if most else -1.0, 1.12 * most or 1.0


def along(flops: float, scale: str, left: float, right: float) -> float:
    """Where a cost stands on the axis, as a share of it."""
    if scale == "log":
        return math.log(max(flops, left) / left) / math.log(right / left)
    return (flops - left) / (right - left)


def back(share: float, scale: str, left: float, right: float) -> float:
    """The cost at a share of the axis."""
    return left * (right / left) ** share if scale == "log" else left + share * (right - left)


def side_by_side(points: Sequence[Point], scale: str, left: float, right: float) -> list[float]:
    """Shifts in shares of the axis that set points of nearly the same cost beside each other, group by group."""

    order = sorted(range(len(points)), key=lambda index: points[index].flops)
    shares = [along(point.flops, scale, left, right) for point in points]
    shifts, cluster = [0.0] * len(points), []
    for position, index in enumerate(order):
        cluster.append(index)
        last = position + 1 == len(order)
        if last or shares[order[position + 1]] - shares[index] > 0.02:
            step = min(0.012, 0.16 / len(cluster))
            for place, member in enumerate(sorted(cluster, key=lambda i: (points[i].colour, i))):
                shifts[member] = step * (place - (len(cluster) - 1) / 2)
            cluster = []
    return shifts


def label_places(heights: Sequence[float]) -> list[float]:
    """Heights of labels (share of the axis), near their points' and evenly apart where they would overlap."""
    if not heights:
        return []
    gap = min(1.0 / max(1, len(heights) - 1), 0.06) if len(heights) > 1 else 0.0
    order = sorted(range(len(heights)), key=heights.__getitem__)
    places = [0.0] * len(heights)
    floor = 0.0
    for index in order:
        places[index] = floor = max(floor, min(1.0, heights[index]))
        floor += gap
    ceiling = 1.0
    for index in reversed(order):
        places[index] = ceiling = min(ceiling, places[index])
        ceiling -= gap
    return places

"""The figure of an evaluation: every task's score with its interval."""

from __future__ import annotations

from typing import Any

from thence.evaluate.summary import Result
from thence.pages.figure import Chart, Figure, whole
from thence.stats.spread import Score

_ROW = 30


def score_figure(result: Result) -> Figure | None:
    """avg@k in per cent of every task and every mean of a group; None where no task has one."""
    held = [(row.task.title or row.task.name, row.avg) for row in result.tasks if row.avg is not None]
    held += [(f"{group.name} mean", group.score) for group in result.groups]
    if not held:
        return None
    rows = [_row(name, score) for name, score in held]
    names = list(dict.fromkeys(name for name, _ in held))
    y = {"field": "name", "type": "nominal", "sort": names, "title": None, "axis": {"labelLimit": 190, "domain": False}}
    x = {"type": "quantitative", "title": "right answers, %", "scale": {"domain": [0, 100]}}
    said = (("name", "task", ""), ("value", "avg@k, %", ".1f"), ("lo", "from", ".1f"), ("hi", "to", ".1f"))
    tooltip = [{"field": field, "title": title, **({"format": form} if form else {})} for field, title, form in said]
    paint, encoding = {"color": "var(--series-0)"}, {"y": y, "tooltip": tooltip}
    layers: list[dict[str, Any]] = [
        {
            "mark": {"type": "bar", "height": 12, "opacity": 0.35, **paint},
            "encoding": {"x": {**x, "field": "lo"}, "x2": {"field": "hi"}},
        },
        {"mark": {"type": "tick", "thickness": 3, "size": 20, **paint}, "encoding": {"x": {**x, "field": "value"}}},
    ]
    spec = {"data": {"values": rows}, "encoding": encoding, "layer": layers}
    words = "avg@k with 95% intervals: " + ", ".join(f"{name} {100 * score.value:.1f} %" for name, score in held)
    return Figure("", (Chart(whole(spec), words, _ROW * len(names) + 60),))


def _row(name: str, score: Score) -> dict[str, Any]:
    return {"name": name, "value": 100 * score.value, "lo": 100 * score.low, "hi": 100 * score.high}

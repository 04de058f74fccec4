"""Curves of training as inline SVG that takes its colours from the page, so that light and dark both work."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

from thence.report.run_files import Training

# Stand-ins that matplotlib can parse; the page's own colours replace them in the SVG text.
_INK, _FAINT, _LINE, _SECOND = "#010203", "#040506", "#070809", "#0a0b0c"
_REPLACED = {_INK: "var(--ink)", _FAINT: "var(--faint)", _LINE: "var(--line)", _SECOND: "var(--second)"}


@dataclass(frozen=True, slots=True)
class Quantity:
    """One curve: key in metrics.jsonl, title, unit of the vertical axis, and a second key drawn over it."""

    key: str
    title: str
    unit: str
    second: str | None = None
    second_label: str = ""


@dataclass(frozen=True, slots=True)
class Curve:
    """A drawn curve."""

    title: str
    svg: str
    last: str


_COMMON = (
    Quantity("grad_norm", "Gradient norm", "L2, before clipping"),
    Quantity("lr", "Learning rate", "learning rate"),
)
QUANTITIES = {
    "sft": (
        Quantity("loss", "Loss", "nats a trained token", "held_out_loss", "held out"),
        *_COMMON,
        Quantity("entropy", "Entropy", "nats a token"),
    ),
    "rl": (
        Quantity("reward", "Reward", "mean over rollouts"),
        Quantity("response_tokens", "Response length", "tokens, mean"),
        Quantity("entropy", "Entropy", "nats a token"),
        Quantity("clip_share", "Clipped tokens", "share of tokens"),
        Quantity("loss", "Loss", "surrogate loss"),
        *_COMMON,
    ),
}


def curves(training: Training) -> list[Curve]:
    """The curves of a stage; a quantity that was never measured is left out."""
    drawn = []
    for index, quantity in enumerate(QUANTITIES.get(training.kind, QUANTITIES["sft"])):
        xs, ys = training.series(quantity.key)
        if not xs:
            continue
        second = training.series(quantity.second) if quantity.second else ([], [])
        svg = _draw(quantity, (xs, ys), second, salt=f"{training.stage}-{index}")
        drawn.append(Curve(quantity.title, svg, f"{ys[-1]:.4g} at step {xs[-1]:,.0f}"))
    return drawn


def _draw(quantity: Quantity, main: tuple[list, list], second: tuple[list, list], salt: str) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.family": "sans-serif",
        "font.size": 9,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.0, 2.3), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        style = {"marker": "o", "markersize": 3} if len(main[0]) < 3 else {}
        axes.plot(*main, color=_LINE, linewidth=1.1, solid_joinstyle="round", **style)
        if second[0]:
            axes.plot(*second, color=_SECOND, linewidth=1.1, marker="o", markersize=3, label=quantity.second_label)
            axes.annotate(
                quantity.second_label,
                (second[0][-1], second[1][-1]),
                textcoords="offset points",
                xytext=(0, 6),
                ha="right",
                color=_SECOND,
            )
        if min(main[1]) == max(main[1]):  # a flat line, not noise blown up to the height of the chart
            low, high = sorted((0.0, 1.5 * main[1][0] or 1.0))
            axes.set_ylim(low, high)
        axes.set_xlabel("step", color=_INK)
        axes.set_ylabel(quantity.unit, color=_INK)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(colors=_INK, length=0)
        axes.grid(axis="y", color=_FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(_FAINT)
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), quantity)


def _inline(svg: str, quantity: Quantity) -> str:
    """The bare <svg> element, fluid in width, labelled, in the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|text|xtick|ytick|matplotlib\.axis)_\d+"', "", svg)
    svg = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', _opening(quantity), svg, count=1)
    svg = re.sub(r"font: (\d+)px [^;\"]*", r"font-size: \1px", svg)
    for stand_in, colour in _REPLACED.items():
        svg = svg.replace(stand_in, colour)
    return svg


def _opening(quantity: Quantity) -> str:
    label = f"{quantity.title}, {quantity.unit}, by step"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="\\1" '
        f'role="img" aria-label="{label}">'
    )

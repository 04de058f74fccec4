"""Figures drawn with matplotlib, as SVG in the page's own colours (so that light and dark both work) or as PNG."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thence.foreign_text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)))
"""Of the first, second and third line of a colour."""
SVG_DASHES = ("", "5 2", "1.5 1.5")
"""The same as ``stroke-dasharray``."""


@dataclass(frozen=True)
class Palette:
    """Colours of text (``ink``, ``soft``), lines (``faint``), areas (``paper``, ``wash``) and series in their order."""

    ink: str
    soft: str
    faint: str
    paper: str
    wash: str
    series: tuple[str, ...]

    def line(self, index: int) -> tuple[str, Any]:
        """Colour and dash of the line of this index."""
        return self.series[index % len(self.series)], DASHES[index // len(self.series) % len(DASHES)]


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
# Stand-ins that matplotlib can parse; the variables of base.html replace them in the SVG text.
PAGE = Palette("#010203", "#040506", "#070809", "#0c0d0e", "#0f1011", tuple(f"#0a0b{index:02x}" for index in range(8)))
_REPLACED = {getattr(PAGE, name): f"var(--{name})" for name in ("ink", "soft", "faint", "paper", "wash")} | {
    colour: f"var(--series-{index})" for index, colour in enumerate(PAGE.series)
}


@dataclass(frozen=True)
class Key:
    """What a line means: its name, its colour (index of the page's series) and its dash (index of DASHES)."""

    name: str
    colour: int
    dash: int

    @classmethod
    def of(cls, name: str, index: int) -> Key:
        """The key of the line of this index, see :meth:`Palette.line`."""
        return cls(name, index % len(PAGE.series), index // len(PAGE.series) % len(DASHES))


@dataclass(frozen=True)
class Figure:
    """A drawn figure: heading, SVG, the keys of its lines, notes, and whether it takes two thirds of the page."""

    title: str
    svg: str
    keys: tuple[Key, ...] = ()
    notes: tuple[str, ...] = ()
    narrow: bool = False


def canvas(width: float, height: float, right: float = 0.1, below: float = 0.5, above: float = 0.12) -> Canvas:
    """An empty figure without a background and with fixed margins.

    Args:
        width, height: in inches.
        right, below, above: margins in inches; left there is room for an axis with its label.
    """
    figure = fitted_canvas(width, height)
    figure.set_layout_engine(None)
    figure.subplots_adjust(
        left=0.62 / width, right=1 - right / width, bottom=below / height, top=1 - above / height, wspace=0.28
    )
    return figure


def fitted_canvas(width: float, height: float) -> Canvas:
    """An empty figure without a background, whose margins fit its labels; width and height in inches."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    return figure


def plain_axes(axes: Axes, palette: Palette, x: str, y: str) -> None:
    """The look of all panels: a faint grid, a base line, no frame."""
    axes.set_xlabel(x, color=palette.ink)
    axes.set_ylabel(y, color=palette.ink)
    axes.tick_params(colors=palette.ink, length=0)
    axes.grid(axis="y", color=palette.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(palette.faint)


def drawing_settings(salt: str) -> dict[Any, Any]:
    """For ``matplotlib.rc_context``, around all drawing: text stays text, and the same figure gives the same bytes."""
    look = {"font.family": "sans-serif", "font.size": 9, "text.parse_math": False}
    return {"svg.fonttype": "none", "svg.hashsalt": salt, **look}


def inline(figure: Canvas, words: str) -> str:
    """The bare <svg> element, fluid in width, in the page's colours and font; ``words`` say what it shows."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = visible(buffer.getvalue())
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[^"]*_\d+"', "", svg)
    opening = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="'
    label = f'" role="img" aria-label="{escape(words)}">'
    svg = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', lambda found: opening + found[1] + label, svg, count=1)
    svg = re.sub(r"font: ((?:bold )?)(?:[\w-]+ )*?([\d.]+)px [^;\"]*", r"font-size: \2px", svg)
    svg = re.sub(r" ?font-family: [^;\"]*;?", "", svg)
    for stand_in, colour in _REPLACED.items():
        svg = svg.replace(stand_in, colour)
    return svg


def write_png(figure: Canvas, path: Path, palette: Palette) -> None:
    """A picture of the figure at 160 dots an inch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=160, facecolor=palette.paper, metadata={"Software": None})

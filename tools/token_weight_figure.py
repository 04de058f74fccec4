"""Draws docs/token-weight-cut.svg: the weights of a batch's tokens under the mean of micro-batch means.

    python tools/token_weight_figure.py

It is the picture of docs/token-weight.md where no JavaScript runs; on the site tools/site/_static/token-weight.js
draws the same batch and lets the reader cut it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = (2, 2, 4, 4, 6, 8, 10, 12)
CUTS = (2, 4, 6)
SIDE, ROW, LEFT, TOP = 18, 26, 16, 16


def main() -> int:
    """Write the picture."""
    (ROOT / "docs/token-weight-cut.svg").write_text(picture())
    print("docs/token-weight-cut.svg")
    return 0


def weights(lengths: Sequence[int], cuts: Sequence[int]) -> list[float]:
    """The weight of each row's tokens as a multiple of the right one, if micro-batch means are averaged.

    Args:
        lengths: trained tokens of each row.
        cuts: rows before which a micro-batch begins, the first left out.
    """
    borders = [0, *cuts, len(lengths)]
    found = []
    for begin, end in pairwise(borders):
        weight = sum(lengths) / ((len(borders) - 1) * sum(lengths[begin:end]))
        found += [weight] * (end - begin)
    return found


def picture() -> str:
    """The picture as SVG."""
    width, height = 2 * LEFT + max(LENGTHS) * (SIDE + 2) + 60, 2 * TOP + len(LENGTHS) * ROW
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="14">',
        f'<rect width="{width}" height="{height}" rx="6" fill="white"/>',
    ]
    for row, (length, weight) in enumerate(zip(LENGTHS, weights(LENGTHS, CUTS), strict=True)):
        top = TOP + row * ROW
        if row in CUTS:
            line = top - (ROW - SIDE) / 2
            parts.append(f'<path d="M{LEFT} {line}H{width - LEFT}" stroke="#333" stroke-width="2"/>')
        parts += [
            f'<rect x="{LEFT + token * (SIDE + 2)}" y="{top}" width="{SIDE}" height="{SIDE}" fill="{_colour(weight)}"/>'
            for token in range(length)
        ]
        right = width - LEFT
        parts.append(f'<text x="{right}" y="{top + 14}" text-anchor="end" fill="#333">{weight:.2f}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _colour(weight: float) -> str:
    """Orange above one, blue below, grey at one."""
    strength = min(abs(math.log2(weight)) / 1.6, 1.0)
    end = (217, 95, 2) if weight > 1 else (31, 119, 180)
    return f"rgb({', '.join(str(round(170 + (channel - 170) * strength)) for channel in end)})"


if __name__ == "__main__":
    sys.exit(main())

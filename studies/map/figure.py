"""Draw every method's difference to SFT, then RL against what the base knew before training.

Run:  python studies/map/figure.py [RESULTS] [--out studies/map/map.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen
import numpy as np

from thence.compare.result import Column, Comparison, read_results
from thence.compare.statistics import Statistics, statistics
from thence.compare.turning import Turning, turnings
from thence.stats.typical import typical_mean

HERE = Path(__file__).parent
ARMS = {
    "rl": "RL alone",
    "luffy": "LUFFY",
    "hpt": "HPT",
    "prefix-rft": "Prefix-RFT",
    "srft": "SRFT",
    "trapo": "TRAPO",
    "relift": "ReLIFT",
    "sft": "SFT alone",
}
SPLITS = {"in-distribution": "in distribution", "out-of-distribution": "out of distribution"}
POINTS, EIGHTHS = 100, 8


def column_of(comparison: Comparison, split: str) -> Column:
    """The first column of a test set."""
    return next(column for column in comparison.columns if column.split == split)


def panel(axis: Any, turned: Turning) -> None:
    """Dots of blocks, the means of eighths with their intervals, the line with its band, and where it crosses zero."""
    skill, differences = POINTS * np.array(turned.covariate), POINTS * np.array(turned.differences)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.scatter(skill, differences, s=6, color="tab:gray", alpha=0.6, linewidths=0)
    for places in np.array_split(np.arange(len(skill)), EIGHTHS):
        if len(places) > 1:
            test = typical_mean(differences[places].tolist())
            ends = [end for end in test.interval(0.95) if np.isfinite(end)]
            axis.plot([skill[places].mean()] * len(ends), ends, color="black", linewidth=0.9)
            axis.scatter(skill[places].mean(), test.estimate, s=14, color="black", zorder=3)
    if (fit := turned.line) is None:
        return
    places, line, low, high = (POINTS * np.array(values) for values in (fit.places, fit.fit, fit.low, fit.high))
    axis.fill_between(places, low, high, color="tab:blue", alpha=0.2, linewidth=0)
    axis.plot(places, line, color="tab:blue", linewidth=1.2)
    if fit.crossing.at is not None:
        axis.axvline(POINTS * fit.crossing.at, color="tab:red", linewidth=1, linestyle="--")


def draw(found: Statistics, out: Path) -> None:
    """One row a test set, one column a method."""
    comparison = found.comparison
    known = {arm.name for arm in comparison.arms}
    arms = [arm for arm in ARMS if arm in known]
    figure, axes = plt.subplots(
        len(SPLITS), len(arms), figsize=(1.45 * len(arms) + 0.6, 4.4), sharex=True, sharey="row", layout="constrained"
    )
    for row, (split, title) in zip(axes, SPLITS.items(), strict=True):
        column = column_of(comparison, split)
        made = {turned.arm: turned for turned in turnings(comparison, found.decisions, arms, "sft-then-rl", column)}
        for axis, arm in zip(row, arms, strict=True):
            axis.spines[["top", "right"]].set_visible(False)
            if arm in made:
                panel(axis, made[arm])
        row[0].set_ylabel(f"{title}\npoints above SFT, then RL", fontsize=8)
        for height, side, where in ((0.98, "top", "the method leads"), (0.02, "bottom", "SFT, then RL leads")):
            row[-1].text(
                0.98, height, where, transform=row[-1].transAxes, ha="right", va=side, fontsize=7, color="tab:red"
            )
    for axis, arm in zip(axes[0], arms, strict=True):
        axis.set_title(ARMS[arm], fontsize=9)
    figure.supxlabel("accuracy of the base before training, %", fontsize=9)
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
    figure.savefig(out, dpi=130)


def main() -> None:
    """Read the kept results and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=HERE)
    parser.add_argument("--out", type=Path, default=HERE / "map.png")
    args = parser.parse_args()
    comparison = read_results(args.results)
    if comparison.pending:
        raise SystemExit(
            f"{args.results}: {comparison.pending} runs are not finished, and contrasts are looked at once: no figure"
        )
    found = statistics(comparison)
    if found.decisions.covariate is None or not found.comparison.runs:
        raise SystemExit(f"{args.results}: there is no finished run, or nothing that tells blocks apart: no figure")
    draw(found, args.out)


if __name__ == "__main__":
    main()

"""The picture of README.md: the weight that three trainers give to the trained tokens of the same eight examples.

    python benchmarks/plot_weights.py

Reads the audits under ``benchmarks/results/audit`` (measured from real optimizer steps by ``thence audit``) and writes
``docs/token-weights.svg``.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
CASE = "micro 2 x 4"
TRAINERS = {
    "transformers-4.45.2": "transformers 4.45.2: mean of means",
    "deepspeed-0.18.9": "DeepSpeed 0.18.9, ZeRO 2, CPU optimizer",
    "thence": "thence: token mean",
}
LOST, OFF, RIGHT = "#c0392b", "#d68910", "#1e8449"


def weights_of(audit: Path) -> list[float]:
    """The weight of each example's tokens in the first step of the case; 1 is what a token mean gives."""
    cases = {case["case"]["name"]: case for case in json.loads(audit.read_text())["cases"]}
    return [sequence["weight"] for sequence in cases[CASE]["steps"][0]["sequences"]]


def draw(axes: Axes, title: str, weights: list[float]) -> None:
    """A bar per example, micro-batches shaded in turn."""
    for start in range(0, len(weights), 4):
        axes.axvspan(start - 0.5, start + 1.5, color="#00000010", linewidth=0)
    axes.axhline(1, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)))
    for place, weight in enumerate(weights):
        lost, right = abs(weight) < 0.01, abs(weight - 1) < 0.01
        color = LOST if lost else RIGHT if right else OFF
        axes.bar(place, max(weight, 0.0), width=0.7, color=color)
        if lost:
            axes.text(place, 0.05, "lost", ha="center", va="bottom", fontsize=8, color=color)
        else:
            text = f"{round(weight, 3) + 1e-9:.2f}"  # 0.625, measured as 0.62499, is 0.63
            axes.text(place, weight - 0.06, text, ha="center", va="top", fontsize=7.5, color="white")
    axes.set_title(title, fontsize=9.5)
    axes.set_xticks(range(len(weights)), [str(place + 1) for place in range(len(weights))], fontsize=8)
    axes.set_xlabel("example (shading: micro-batches of 2)", fontsize=8)
    axes.tick_params(axis="both", length=0, labelsize=8)
    axes.set_xlim(-0.6, len(weights) - 0.4)
    axes.set_ylim(0, 2.4)
    axes.set_yticks([0, 1, 2])
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> None:
    """Draw the three panels side by side."""
    plt.rcParams.update({"svg.hashsalt": "thence", "font.family": "DejaVu Sans"})
    figure, panels = plt.subplots(1, len(TRAINERS), figsize=(10.5, 2.9), sharey=True, layout="constrained")
    for axes, (name, title) in zip(panels, TRAINERS.items(), strict=True):
        draw(axes, title, weights_of(ROOT / "benchmarks" / "results" / "audit" / f"{name}.json"))
    panels[0].set_ylabel("weight of a token\n(1 = token mean)", fontsize=8.5)
    figure.savefig(ROOT / "docs" / "token-weights.svg", facecolor="white", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()

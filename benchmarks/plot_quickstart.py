"""Draw the curves of runs of the quickstart, one thin line a seed and their mean.

python benchmarks/plot_quickstart.py runs/seeds/quickstart-seed* --out docs/quickstart-curves.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen

PANELS = (
    ("sft", "loss", "SFT loss (nats per token)"),
    ("rl", "reward", "RL reward (share right)"),
    ("rl", "response_tokens", "RL response length (tokens)"),
    ("rl", "entropy", "RL entropy (nats)"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    runs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in args.runs]
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 3), layout="constrained")
    for axis, (stage, field, title) in zip(axes, PANELS, strict=True):
        curves = [[line[field] for line in lines if line["stage"] == stage] for lines in runs]
        steps = range(1, min(map(len, curves)) + 1)
        for curve in curves:
            axis.plot(steps, curve[: len(steps)], color="tab:blue", alpha=0.3, linewidth=0.8)
        axis.plot(steps, [sum(at) / len(at) for at in zip(*curves, strict=False)], color="tab:blue")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()

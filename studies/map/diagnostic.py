"""Measure every base of the study as an owner would measure his own: eight samples a problem before training.

Run:  python studies/map/diagnostic.py FOLDER      (of the comparison, with its bases; a minute for ten bases)

What a base solves is set beside what the study found from it: SFT, then RL less RL. diagnostic.json keeps both, and
diagnostic.md has the table. Bases that were measured before stay in the file when their folders are gone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from thence.compare.decisions import BlockId, scores_of
from thence.compare.result import Comparison, read_results
from thence.files import to_json, write_atomically

HERE = Path(__file__).parent
SUITE = HERE / "diagnostic.toml"
SAMPLES = 8
NEVER_SOLVED = (1.0, 0.9, 0.6, 0.3, 0.1, 0.0)
"""Ends of the table's groups, as shares of problems that no sample solves."""
SPLITS = {"in-distribution": "in distribution", "out-of-distribution": "out of distribution"}
Measure = Mapping[str, float]


def measured(base: Path) -> Measure:
    """Accuracy and share of problems that no sample solves.

    Raises:
        subprocess.CalledProcessError: the base cannot be measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "thence", "eval", str(base), "--suite", str(SUITE), "--folder", folder]
        subprocess.run([*command, "--quiet"], check=True, stdout=subprocess.DEVNULL)
        found = json.loads((Path(folder) / "results.json").read_text())["results"]["prompts"]
    return {"accuracy": found["exact_match,none"], "never_solved": 1 - found[f"pass@{SAMPLES},none"]}


HEAD = """# Bases by the share of problems that they never solve

Written by `diagnostic.py` from `diagnostic.json` and `results.json`: eight samples a problem at T = 1. Differences are
points, means over bases, with the smallest and the largest in brackets.

"""


def all_measured(folder: Path, blocks: Sequence[BlockId], out: Path) -> dict[str, Measure]:
    """Every block's base, by base and seed.

    Raises:
        SystemExit: a base's folder is gone, and it was not measured before.
    """
    known: dict[str, Measure] = json.loads(out.read_text()) if out.exists() else {}
    for block in tqdm(blocks, unit="base", disable=None):
        name, base = f"{block[0]}/seed{block[1]}", base_of(folder, block)
        if name in known:
            continue
        if base is None:
            raise SystemExit(f"{folder}: the base {name} is not there, nor in {out}")
        known[name] = measured(base)
        write_atomically(out, to_json(known, indent=1) + "\n")
    return known


def base_of(folder: Path, block: BlockId) -> Path | None:
    """The folder of a block's base; None where it is not there, or not pretrained to its end."""
    name, seed = block
    folders = sorted((folder / "bases" / name).glob(f"seed{seed}-????????"))
    done = [base for base in folders if (base / "stages" / "sft-pretrain" / "done.json").exists()]
    return done[0] if len(done) == 1 else None


def table(comparison: Comparison, bases: Mapping[str, Measure]) -> str:
    """Bases by the share of problems that they never solve, with what SFT first was worth, in Markdown."""
    scores = scores_of(comparison)
    leads: dict[str, dict[BlockId, float]] = {}
    for split in SPLITS:
        column = next(column for column in comparison.columns if column.split == split)
        found = {block: scores.difference("sft-then-rl", "rl", block, column) for block in comparison.blocks}
        leads[split] = {block: lead for block, lead in found.items() if lead is not None}
    heads = [f"SFT, then RL less RL, {title}" for title in SPLITS.values()]
    head = ["no sample right, % of problems", "bases", "accuracy at T = 1", *heads]
    lines = [head, ["---"] * len(head)]
    for high, low in pairwise(NEVER_SOLVED):
        inside = [block for block in comparison.blocks if _inside(bases[f"{block[0]}/seed{block[1]}"], low, high)]
        if not inside:
            continue
        accuracy = 100 * np.mean([bases[f"{name}/seed{seed}"]["accuracy"] for name, seed in inside])
        row = [f"{100 * low:.0f} to {100 * high:.0f}", str(len(inside)), f"{accuracy:.0f}"]
        lines.append([*row, *(_spread([leads[split][block] for block in inside]) for split in SPLITS)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _inside(base: Measure, low: float, high: float) -> bool:
    return low < base["never_solved"] <= high or base["never_solved"] == low == 0


def _spread(leads: Sequence[float]) -> str:
    """Mean, and from which to which."""
    points = 100 * np.array(leads)
    return f"{points.mean():+.0f} ({points.min():+.0f} to {points.max():+.0f})"


def main() -> None:
    """Measure what is not measured yet, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    comparison, out = read_results(folder), HERE / "diagnostic.json"
    if comparison.pending:  # bases can be measured in pieces: no contrast is of them
        bases = all_measured(folder, [block for block in comparison.blocks if base_of(folder, block)], out)
        raise SystemExit(
            f"{folder}: {len(bases)} bases are measured. {comparison.pending} runs are not finished, and contrasts are "
            "looked at once"
        )
    bases = all_measured(folder, comparison.blocks, out)
    write_atomically(HERE / "diagnostic.md", HEAD + table(comparison, bases))


if __name__ == "__main__":
    main()

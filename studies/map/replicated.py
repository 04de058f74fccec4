"""Two more blocks: do they fall where the study says?

Run:  python studies/map/replicated.py [FOLDER]      (of the comparison replication.toml; default: the kept results)

For each primary difference a parabola in base skill is fitted to the study's blocks. A new block of that skill should
lie within the interval that holds 95% of new blocks: the fit, its error, and the spread around it, by Student's t. The
table goes to replication.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from thence.compare.decisions import BlockId, scores_of
from thence.compare.result import RESULTS, Comparison, read_results, results_json
from thence.files import write_atomically

HERE = Path(__file__).parent
KEPT = HERE / "replication"
sys.path.insert(0, str(HERE))
from claims import IN, MIXED, OUT, Claim, differences_of  # noqa: E402  # a script of this folder, not of a package
from tables import points, table  # noqa: E402

DIFFERENCES = (
    Claim("Correct SFT less SFT with the published bugs", "sft", ("sft-faulty",), IN),
    Claim("SFT, then RL less the best mixed-policy method", "sft-then-rl", MIXED, IN),
    Claim("SFT, then RL less RL alone", "sft-then-rl", ("rl",), IN),
    Claim("SFT, then RL less RL alone, out of distribution", "sft-then-rl", ("rl",), OUT),
)
DEGREE = 2
LEAST_MEAN = 3
"""Blocks from which on their mean is told too: the two of the replication were to be judged one by one."""
HEAD = ["difference", "new base (accuracy before training)", "expected, 95% of new blocks", "found", ""]


@dataclass(frozen=True)
class Expected:
    """Where a new block should lie, as shares."""

    fit: float
    low: float
    high: float


def expected(skill: list[float], differences: list[float], at: list[float]) -> Expected:
    """The interval that holds 95% of new blocks of this skill; for several, of the means of so many new blocks."""
    x, y = np.vander(np.array(skill), DEGREE + 1), np.array(differences)
    new = np.vander(np.array(at), DEGREE + 1).mean(0)
    inverse = np.linalg.inv(x.T @ x)
    left = len(y) - x.shape[1]
    fitted = inverse @ x.T @ y
    spread = float(np.sum((y - x @ fitted) ** 2)) / left
    reach = float(stats.t.ppf(0.975, left) * np.sqrt(spread * (1 / len(at) + new @ inverse @ new)))
    middle = float(new @ fitted)
    return Expected(middle, middle - reach, middle + reach)


def skills_of(comparison: Comparison) -> dict[BlockId, float]:
    """Accuracy of every base on the dev problems."""
    scores = scores_of(comparison)
    dev = next(column for column in comparison.columns if column.split == "dev")
    found = {block: scores.at("base", block, dev) for block in comparison.blocks}
    return {block: measured.accuracy for block, measured in found.items() if measured is not None}


def rows_of(study: Comparison, new: Comparison, claims: tuple[Claim, ...] = DIFFERENCES) -> list[list[str]]:
    """A row for every difference and new block, and for the mean of at least `LEAST_MEAN` blocks."""
    rows: list[list[str]] = []
    known, added = skills_of(study), skills_of(new)
    for claim in claims:
        before, after = (
            differences_of(claim, each, scores_of(each), next(c for c in each.columns if c.split == "dev"))
            for each in (study, new)
        )
        blocks = sorted(before)
        new_blocks = sorted(after, key=lambda block: added[block])
        named = {f"{block[0]}, seed {block[1]} ({100 * added[block]:.0f}%)": [block] for block in new_blocks}
        if len(after) >= LEAST_MEAN:
            named[f"mean of {len(after)}"] = new_blocks
        for name, chosen in named.items():
            at = [added[block] for block in chosen]
            should = expected([known[b] for b in blocks], [before[b] for b in blocks], at)
            found = sum(after[block] for block in chosen) / len(chosen)
            inside = should.low <= found <= should.high
            reach = f"{points(should.fit)} [{points(should.low)}, {points(should.high)}]"
            rows.append([claim.says, name, reach, points(found), "inside" if inside else "**outside**"])
    return rows


def main() -> None:
    """Keep the results, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=KEPT)
    folder = parser.parse_args().folder
    study, new = read_results(HERE), read_results(folder)
    if study.pending or new.pending:
        raise SystemExit(f"{study.pending + new.pending} runs are not finished, and they are looked at once")
    if folder.resolve() != KEPT:
        command = re.sub(r" --folder \S+", "", str(new.environment.get("command", "")))
        KEPT.mkdir(exist_ok=True)
        kept = replace(new, environment={**new.environment, "command": command})
        write_atomically(KEPT / RESULTS, results_json(kept))
    text = "# Two more blocks\n\nWritten by `replicated.py` from `replication/results.json`. Points.\n\n"
    write_atomically(HERE / "replication.md", text + table(HEAD, rows_of(study, new)) + "\n")


if __name__ == "__main__":
    main()

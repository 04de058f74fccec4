"""What the comparisons beside the study say: other demonstrations, budgets, temperatures and widths.

Run:  python studies/map/beside.py [NAME=FOLDER ...]      (NAME: of a comparison that variants.py writes)

The results of a folder are kept here in NAME/results.json. beside.md has a section for every comparison that is kept:
mean accuracy of every arm by level of the base, and its difference to RL alone over all blocks, with a 95% interval.
They are exploratory: few blocks, and nothing is corrected.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from thence.compare.decisions import BlockId, scores_of
from thence.compare.result import RESULTS, Column, Comparison, Measured, read_results, results_json
from thence.files import write_atomically
from thence.stats.typical import typical_mean

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from replicated import DIFFERENCES, HEAD, rows_of  # noqa: E402  # scripts of this folder, not of a package
from tables import NONE, SPLITS, points, table  # noqa: E402

NAMES = ("demonstrations", "sampling", "half", "double", "wider")
OTHER = "rl"
PAIRS = {
    "SFT, then RL less SFT, then RL of the study": ("sft-then-rl-{}", "sft-then-rl"),
    "SFT less SFT of the study": ("sft-{}", "sft"),
    "SFT, then RL less LUFFY, of the same demonstrations": ("sft-then-rl-{}", "luffy-{}"),
    "SFT, then RL less SFT, of the same demonstrations": ("sft-then-rl-{}", "sft-{}"),
}
"""Of a comparison of demonstrations: two arms, where `{}` is the kind of demonstrations."""
KINDS = ("256", "4096", "careful", "hasty", "wrong")
SETTINGS = ("half", "double", "wider")
"""Comparisons of the same arms under other settings: each is told beside the study."""
AGAINST_RL = tuple(claim for claim in DIFFERENCES if claim.other == (OTHER,))
LEAST_BLOCKS = 3
"""Blocks from which on a mean has an interval."""


def solved(measured: Measured) -> float:
    """The share of problems that at least one sample solves."""
    return float(np.mean([right > 0 for right in measured.right]))


def section(comparison: Comparison, column: Column, at_least_one: bool = False) -> str:
    """Every arm's mean by level, and its difference to RL alone.

    Args:
        at_least_one: of problems that at least one of the samples solves, in place of accuracy.
    """
    scores = scores_of(comparison)
    levels = list(dict.fromkeys(base for base, _ in comparison.blocks))

    def score(arm: str, block: BlockId) -> float:
        measured = scores.at(arm, block, column)
        assert measured is not None, f"{arm} from {block} is not finished"
        return solved(measured) if at_least_one else measured.accuracy

    rows = []
    for arm in comparison.arms:
        found = {block: score(arm.name, block) for block in comparison.blocks}
        means = [points(np.mean([found[b] for b in found if b[0] == level]).item(), "") for level in levels]
        difference = [value - score(OTHER, block) for block, value in found.items()]
        rows.append([arm.title, *means, NONE if arm.name == OTHER else spread(difference)])
    return table(["arm", *levels, "less RL alone [95%]"], rows)


def paired(comparison: Comparison, column: Column) -> str:
    """What other demonstrations change: differences of two arms over blocks, for every kind."""
    scores, known = scores_of(comparison), {arm.name for arm in comparison.arms}
    rows = []
    for title, arms in PAIRS.items():
        row = [title]
        for kind in KINDS:
            one, other = (arm.format(kind) for arm in arms)
            found = [scores.difference(one, other, block, column) for block in comparison.blocks]
            complete = [difference for difference in found if difference is not None]
            row.append(spread(complete) if {one, other} <= known and len(complete) == len(found) else NONE)
        rows.append(row)
    return table(["difference", *KINDS], rows)


def leads(compared: dict[str, Comparison], split: str) -> str:
    """SFT, then RL less RL alone by level of the base, in several comparisons; levels are those of the last of them."""
    columns = []
    for comparison in compared.values():
        scores, column = scores_of(comparison), next(c for c in comparison.columns if c.split == split)
        found: dict[str, list[float]] = {}
        for block in comparison.blocks:
            difference = scores.difference("sft-then-rl", OTHER, block, column)
            assert difference is not None, f"{block} is not finished"
            found.setdefault(block[0], []).append(difference)
        columns.append({level: points(np.mean(values).item()) for level, values in found.items()})
    rows = [[level, *(column.get(level, NONE) for column in columns)] for level in columns[-1]]
    return table(["level of the base", *compared], rows)


def spread(differences: list[float]) -> str:
    """The mean over blocks with its interval."""
    test = typical_mean(differences)
    low, high = test.interval(0.95)
    known = len(differences) >= LEAST_BLOCKS and np.isfinite(low) and np.isfinite(high)
    return points(test.estimate) + (f" [{points(low)}, {points(high)}]" if known else "")


def written(name: str, comparison: Comparison) -> str:
    """A comparison's section."""
    about = f"{len(comparison.blocks)} blocks, {comparison.budget} an arm (`{name}.toml`)."
    text = f"\n## {comparison.description}\n\n{about}\n"
    temperatures = {column.temperature for column in comparison.columns if column.split in SPLITS}
    for column in comparison.columns:
        if column.split not in SPLITS:
            continue
        at = f" at T = {column.temperature:g}" if len(temperatures) > 1 else ""
        text += f"\n**Accuracy {SPLITS[column.split]}{at}**\n\n{section(comparison, column)}\n"
        if name == "demonstrations":
            text += f"\n**Differences {SPLITS[column.split]}{at}**\n\n{paired(comparison, column)}\n"
        samples = {
            measured.samples for run in comparison.runs for measured in run.measured if measured.column == column
        }
        if max(samples) > 2:
            heading = f"Problems of which one of {max(samples)} samples is right, {SPLITS[column.split]}{at}"
            text += f"\n**{heading}**\n\n{section(comparison, column, at_least_one=True)}\n"
    return text


def keep(name: str, folder: Path) -> None:
    """Copy a folder's results here, without the name of the folder. Raises SystemExit: they are not finished."""
    found = read_results(folder)
    if found.pending:
        raise SystemExit(f"{folder}: {found.pending} runs are not finished, and they are looked at once")
    command = re.sub(r" --folder \S+", "", str(found.environment.get("command", "")))
    (HERE / name).mkdir(exist_ok=True)
    kept = replace(found, environment={**found.environment, "command": command})
    write_atomically(HERE / name / RESULTS, results_json(kept))


def main() -> None:
    """Keep the results of the folders that are given, write the tables of all that are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="NAME=FOLDER")
    for given in parser.parse_args().folders:
        name, _, folder = given.partition("=")
        if name not in NAMES:
            raise SystemExit(f"{name} is none of {', '.join(NAMES)}")
        keep(name, Path(folder))
    text = "# Beside the study\n\nWritten by `beside.py`. Means over bases; points.\n"
    for name in NAMES:
        if (HERE / name / RESULTS).exists():
            text += written(name, read_results(HERE / name))
    kept = {name: read_results(HERE / name) for name in SETTINGS if (HERE / name / RESULTS).exists()}
    if kept:
        text += "\n## SFT, then RL less RL alone, beside the study\n"
        for split, title in SPLITS.items():
            text += f"\n**{title.capitalize()}**\n\n{leads({'study': read_results(HERE)} | kept, split)}\n"
        text += "\n## Against a base of the study with the same accuracy\n"
        for comparison in kept.values():
            rows = rows_of(read_results(HERE), comparison, AGAINST_RL)
            text += f"\n**{comparison.description}**\n\n{table(HEAD, rows)}\n"
    write_atomically(HERE / "beside.md", text)


if __name__ == "__main__":
    main()

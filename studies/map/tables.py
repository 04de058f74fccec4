"""Write the tables of the findings page: verdicts, scores by level, where the order turns, claims, and habits.

Run:  python studies/map/tables.py [FOLDER]

FOLDER is the folder of the finished comparison; without it the results that are kept here. The results of a folder are
kept here with their page (report.html, runs.csv, summary.csv). The tables go to tables.md.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from thence.compare.decisions import BlockId, DecidedContrast, scores_of
from thence.compare.result import RESULTS, Column, Comparison, read_results, results_json
from thence.compare.statistics import Statistics, statistics
from thence.compare.turning import turnings
from thence.files import write_atomically
from thence.pages.comparison.decided import crossing_cell
from thence.pages.comparison.page import write_page
from thence.stats.trend import Crossing
from thence.stats.typical import typical_slope

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from claims import THIRDS, claims_of, part_of, said  # noqa: E402  # a script of this folder, not of a package

SPLITS = {"in-distribution": "in distribution", "out-of-distribution": "out of distribution"}
TURNING = ("rl", "luffy", "hpt", "prefix-rft", "srft", "trapo", "relift", "sft", "sft-then-hpt", "faulty-then-rl")
LEFT_OUT, SPLIT_PRODUCTS = "step left out", "written, split products"
NONE, COUNTED = "-", "in-distribution"
NOT_COUNTED = {COUNTED: {"responses": 0}}
Rows = Iterable[Sequence[str]]


def table(head: Sequence[str], rows: Rows) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def points(value: float | None, sign: str = "+") -> str:
    """A share in points; a dash where there is none."""
    return NONE if value is None else f"{100 * value:{sign}.1f}"


def chance(p: float | None) -> str:
    """A p value."""
    return NONE if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def verdicts(decided: Sequence[DecidedContrast]) -> str:
    """Every contrast and what its blocks say."""
    rows = []
    for each in decided:
        contrast = each.contrast
        interval = f"{points(each.estimate)} [{points(each.low)}, {points(each.high)}]"
        if contrast.kind == "slope":
            interval += " for 100 points of skill"
        expected = f"within {points(contrast.equal_within, '')}" if contrast.expect == "equal" else contrast.expect
        family = "primary" if contrast.primary else "exploratory"
        corrected = (chance(each.corrected), chance(each.corrected_equal))
        rows.append([contrast.says, family, expected, interval, *corrected, str(each.finished), f"**{each.outcome}**"])
    head = ["contrast", "family", "expected", "points [95%]", "p, corrected", "p of equality", "blocks", "verdict"]
    return table(head, rows)


def column_of(comparison: Comparison, split: str) -> Column:
    """The first column of a test set."""
    return next(column for column in comparison.columns if column.split == split)


def by_level(comparison: Comparison, split: str) -> str:
    """Mean accuracy of every arm at every level."""
    scores, column = scores_of(comparison), column_of(comparison, split)
    levels = [base for base in comparison.bases if any(block[0] == base for block in comparison.blocks)]
    rows = []
    for arm in comparison.arms:
        row = [arm.title]
        for level in levels:
            found = [scores.at(arm.name, block, column) for block in comparison.blocks if block[0] == level]
            row.append(points(np.mean([m.accuracy for m in found if m is not None]).item(), ""))
        rows.append(row)
    return table(["arm", *levels], rows)


def crossing(found: Crossing) -> str:
    """Where a line is zero, and where its band holds zero."""
    cell = crossing_cell(found)
    return f"{cell.text} {cell.sub}".replace("\n", " ").strip()


def turns(found: Statistics) -> str:
    """Every arm less SFT, then RL: in thirds of skill, and where a line is zero."""
    comparison, rows = found.comparison, []
    titles = {arm.name: arm.title for arm in comparison.arms}
    arms = [arm for arm in TURNING if arm in titles]
    for split, title in SPLITS.items():
        column = column_of(comparison, split)
        for each in turnings(comparison, found.decisions, arms, "sft-then-rl", column):
            if each.line is None:
                continue
            thirds = [part_of(part.tolist()) for part in np.array_split(each.differences, 3)]
            rows.append([titles[each.arm], title, *map(said, thirds), crossing(each.line.crossing)])
    return table(["arm less SFT, then RL", "test set", *THIRDS, "a line is zero at, % [band]"], rows)


def sensitivity(found: Statistics) -> str:
    """The slope of SFT, then RL less RL in base skill, without blocks that could make it alone."""
    scores, column = scores_of(found.comparison), column_of(found.comparison, COUNTED)
    skill = found.decisions.values
    ordered = sorted(skill, key=lambda block: (skill[block], block))
    kept = {"all bases": ordered, "without the strongest base": ordered[:-1]}
    kept |= {
        "without the three strongest": ordered[:-3],
        "without bases that solve nothing": [b for b in ordered if skill[b]],
    }
    rows = []
    for title, blocks in kept.items():
        pairs = [(scores.difference("sft-then-rl", "rl", block, column), skill[block]) for block in blocks]
        known = [(difference, value) for difference, value in pairs if difference is not None]
        low, high = (slope := typical_slope([d for d, _ in known], [value for _, value in known])).interval(0.95)
        rows.append([title, str(len(known)), f"{points(slope.estimate)} [{points(low)}, {points(high)}]"])
    return table(["blocks", "number", "points for 100 points of skill [95%]"], rows)


def claims(comparison: Comparison) -> str:
    """Every claim, over all bases and in thirds of skill."""
    rows = [
        [claim.says, SPLITS[claim.split], f"**{verdict}**", said(whole), *map(said, parts)]
        for claim, verdict, whole, parts in claims_of(comparison)
    ]
    return table(["claim", "test set", "verdict", "all bases", *THIRDS], rows)


def habits(counts: Mapping[str, Sequence[Mapping[str, Any]]], titles: Mapping[str, str], blocks: set[BlockId]) -> str:
    """What responses do: shares over all responses of these blocks.

    Raises:
        SystemExit: a block is not counted yet, or holds no response.
    """
    rows = []
    for arm, title in titles.items():
        lines = {(line["base"], line["seed"]): line for line in counts.get(arm, ())}
        if lacking := [block for block in blocks if not lines.get(block, NOT_COUNTED)[COUNTED]["responses"]]:
            raise SystemExit(f"habits.json lacks {arm} from {min(lacking)}: run habits.py on the study's folder first")
        found = [lines[block] for block in sorted(blocks)]
        entropies = [line["entropy"] for line in found if line["entropy"] is not None]
        entropy = f"{np.mean(entropies):.2f}" if entropies else NONE
        cells = [cell for split in SPLITS for cell in _habit_cells([line[split] for line in found])]
        rows.append([title, *cells, entropy])
    each = ["a step left out, %", "split products, %", "right with split products, %", "tokens"]
    head = ["arm", *(f"{title}: {name}" for title in SPLITS.values() for name in each), "entropy before RL, nats"]
    return table(head, rows)


def _habit_cells(counts: Sequence[Mapping[str, Any]]) -> list[str]:
    responses = sum(each["responses"] for each in counts)
    left_out = sum(each["mistakes"].get(LEFT_OUT, 0) for each in counts)
    split = sum(each["habits"].get(SPLIT_PRODUCTS, 0) for each in counts)
    right = sum(each["right"].get(SPLIT_PRODUCTS, 0) for each in counts)
    shares = (left_out / responses, split / responses, right / split if split else None)
    return [*(points(share, "") for share in shares), f"{sum(each['tokens'] for each in counts) / responses:.0f}"]


def upper_half(values: Mapping[BlockId, float]) -> set[BlockId]:
    """The blocks whose base knows at least as much as the middle one."""
    middle = float(np.median(list(values.values())))
    return {block for block, value in values.items() if value >= middle}


def written(found: Statistics, counts: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """All tables, with their headings."""
    comparison = found.comparison
    titles = {arm.name: arm.title for arm in comparison.arms}
    parts = {"Verdicts": verdicts(found.decisions.contrasts)}
    parts |= {f"Accuracy by level, {title}": by_level(comparison, split) for split, title in SPLITS.items()}
    parts["Where the order turns"] = turns(found)
    parts["How the lead over RL changes with skill, without single bases"] = sensitivity(found)
    parts["Claims"] = claims(comparison)
    upper = upper_half(found.decisions.values)
    parts["What responses do, from the better half of bases"] = habits(counts, titles, upper)
    head = "# The map in tables\n\nWritten by `tables.py` from `results.json` and `habits.json`.\n"
    return head + "".join(f"\n## {title}\n\n{text}\n" for title, text in parts.items())


def keep(folder: Path) -> None:
    """Copy a folder's results here, without the name of the folder, and write their page. Raises UserError."""
    comparison = read_results(folder)
    command = re.sub(r" --folder \S+", "", str(comparison.environment.get("command", "")))
    write_atomically(
        HERE / RESULTS, results_json(replace(comparison, environment={**comparison.environment, "command": command}))
    )
    write_page(HERE)
    (HERE / "report.json").unlink()  # what it holds is in results.json and summary.csv


def main() -> None:
    """Keep the results, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=HERE)
    folder = parser.parse_args().folder
    comparison = read_results(folder)
    if comparison.pending:
        raise SystemExit(f"{folder}: {comparison.pending} runs are not finished, and contrasts are looked at once")
    if folder.resolve() != HERE:
        keep(folder)
    counts = json.loads((HERE / "habits.json").read_text())
    write_atomically(HERE / "tables.md", written(statistics(read_results(HERE)), counts))


if __name__ == "__main__":
    main()

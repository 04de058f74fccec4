"""What the study's blocks say of each claim: over all bases, and in thirds of base skill.

Differences are accuracies on the same problems, block by block, with 95% intervals by sign flips. They are exploratory:
the primary contrasts of study.toml decide, this table tells where a claim holds.

Run:  python studies/map/claims.py [RESULTS] [--out studies/map/claims.csv]
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from thence.compare.decisions import BlockId, Scored, scores_of
from thence.compare.result import Column, Comparison, read_results
from thence.compare.statistics import statistics
from thence.stats.typical import adjustment, typical_mean

HERE = Path(__file__).parent
TITLES = {
    "luffy": "LUFFY",
    "hpt": "HPT",
    "prefix-rft": "Prefix-RFT",
    "srft": "SRFT",
    "relift": "ReLIFT",
    "trapo": "TRAPO",
}
MIXED = tuple(TITLES)
LEAST_ADJUSTED = 5
"""Blocks from which on a parabola in skill can be taken out."""
THIRDS = ("weakest third", "middle third", "strongest third")
Side = Literal["higher", "no higher"]
BOUND = 0.02
"""The largest difference that means nothing, as in study.toml."""


@dataclass(frozen=True)
class Claim:
    """That an arm is better than another, or no better.

    Args:
        says: the claim in words.
        arm, other: arms; several others are the best of them by dev, base by base.
        split: the test set.
        expect: what the claim says of the first arm.
    """

    says: str
    arm: str
    other: tuple[str, ...]
    split: str
    expect: Side = "higher"


IN, OUT = "in-distribution", "out-of-distribution"
CLAIMS = (
    Claim("Correct SFT beats SFT with the published bugs", "sft", ("sft-faulty",), IN),
    Claim("Correct SFT beats SFT with the published bugs, out of distribution", "sft", ("sft-faulty",), OUT),
    Claim("Means of micro-batch means cost SFT accuracy", "sft", ("sft-means",), IN),
    Claim("RL does not make up for faulty SFT", "sft-then-rl", ("faulty-then-rl",), IN),
    Claim("SFT, then RL beats SFT alone", "sft-then-rl", ("sft",), IN),
    Claim("SFT, then RL beats RL alone", "sft-then-rl", ("rl",), IN),
    Claim("SFT, then RL beats RL alone out of distribution", "sft-then-rl", ("rl",), OUT),
    *(Claim(f"SFT, then RL beats {title}", "sft-then-rl", (name,), IN) for name, title in TITLES.items()),
    Claim("SFT, then RL beats the best mixed-policy method of each base", "sft-then-rl", MIXED, IN),
    Claim("SFT, then RL beats the best mixed-policy method out of distribution", "sft-then-rl", MIXED, OUT),
    Claim("Few RL steps after SFT beat the best mixed-policy method", "sft-then-short-rl", MIXED, IN),
    Claim(
        "A mixed-policy method after SFT is no better than RL after SFT",
        "sft-then-hpt",
        ("sft-then-rl",),
        IN,
        "no higher",
    ),
    Claim("SFT that its held-out loss stops is a better start of RL", "stopped-then-rl", ("sft-then-rl",), IN),
    Claim("SFT alone beats the base out of distribution", "sft", ("base",), OUT),
)


@dataclass(frozen=True)
class Part:
    """A difference over some blocks: mean and 95% interval as shares; no interval where the blocks are too few."""

    blocks: int
    mean: float
    low: float | None
    high: float | None

    @property
    def side(self) -> int:
        """1: above zero, -1: below, 0: not told apart from it."""
        return int((self.low or 0) > 0) - int((self.high or 0) < 0)


def part_of(differences: Sequence[float], skill: Sequence[float] = ()) -> Part:
    """The mean of blocks' differences.

    Args:
        skill: of each block's base: what a parabola in it explains is taken out, as in the contrasts of study.toml.
    """
    d = np.array(differences)
    if len(set(skill)) > 2 and len(skill) >= LEAST_ADJUSTED:
        d = adjustment(np.array(skill), 2) @ d
    test = typical_mean(d.tolist())
    low, high = test.interval(0.95)
    whole = np.isfinite(low) and np.isfinite(high)
    return Part(len(differences), test.estimate, low if whole else None, high if whole else None)


def differences_of(claim: Claim, comparison: Comparison, scores: Scored, dev: Column) -> dict[BlockId, float]:
    """Each block's difference; blocks that lack an arm are left out."""
    column = next(column for column in comparison.columns if column.split == claim.split)
    found: dict[BlockId, float] = {}
    for block in comparison.blocks:
        other = claim.other[0] if len(claim.other) == 1 else scores.best(claim.other, block, dev)
        difference = None if other is None else scores.difference(claim.arm, other, block, column)
        if difference is not None:
            found[block] = difference
    return found


def verdict_of(claim: Claim, whole: Part, thirds: Sequence[Part]) -> str:
    """What the intervals say of the claim, taken together.

    That one third is told apart from zero and the others are not, is no sign that the claim depends on skill: it takes
    two parts on opposite sides.
    """
    sides = {part.side for part in thirds}
    if {1, -1} <= {*sides, whole.side}:
        return "depends on skill"
    if claim.expect == "no higher":
        if whole.side == 1:
            return "refuted"
        return "holds" if whole.high is not None and whole.high <= BOUND else "not refuted"
    if whole.side == 0:
        return "not told apart"
    said = "holds" if whole.side == 1 else "refuted"
    return said if sides == {whole.side} else f"{said} on average"


def claims_of(comparison: Comparison) -> list[tuple[Claim, str, Part, list[Part]]]:
    """Every claim that the comparison has arms for: verdict, all blocks, and thirds by base skill."""
    skill = statistics(comparison).decisions.values
    scores, dev = scores_of(comparison), next(column for column in comparison.columns if column.split == "dev")
    result = []
    for claim in CLAIMS:
        found = {b: d for b, d in differences_of(claim, comparison, scores, dev).items() if b in skill}
        if len(found) < len(THIRDS):
            continue
        ordered = sorted(found, key=lambda block: (skill[block], block))
        parts = [part_of([found[ordered[i]] for i in places]) for places in np.array_split(range(len(ordered)), 3)]
        whole = part_of(list(found.values()), [skill[block] for block in found])
        result.append((claim, verdict_of(claim, whole, parts), whole, parts))
    return result


def said(part: Part) -> str:
    """A difference in points, with its interval."""
    interval = "" if part.low is None or part.high is None else f" [{100 * part.low:+.1f}, {100 * part.high:+.1f}]"
    return f"{100 * part.mean:+.1f}{interval}"


def main() -> None:
    """Print the table and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=HERE)
    parser.add_argument("--out", type=Path, default=HERE / "claims.csv")
    args = parser.parse_args()
    comparison = read_results(args.results)
    if comparison.pending:
        raise SystemExit(
            f"{args.results}: {comparison.pending} runs are not finished, and claims are looked at once: no table"
        )
    table = claims_of(comparison)
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["claim", "split", "verdict", "blocks", "all bases", *THIRDS])
        for claim, verdict, whole, parts in table:
            writer.writerow([claim.says, claim.split, verdict, whole.blocks, said(whole), *map(said, parts)])
    print(f"| claim | verdict | all bases | {' | '.join(THIRDS)} |\n|{'---|' * 6}")
    for claim, verdict, whole, parts in table:
        print(f"| {claim.says} | {verdict} | {' | '.join(map(said, [whole, *parts]))} |")


if __name__ == "__main__":
    main()

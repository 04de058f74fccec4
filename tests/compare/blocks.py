"""Made-up comparisons of many blocks, whose differences depend on a base's skill in a known way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tests.compare.comparisons import make_run
from thence.compare.result import Arm, Column, Comparison

TEST, DEV, SKILL = Column("test", 0.6), Column("dev", 0.6), Column("skill", 0.6)
COLUMNS = (TEST, DEV, SKILL)
Accuracy = Callable[[float], float]
"""Of an arm in a block, by the skill of its base."""


def make_blocks(
    arms: Mapping[str, Accuracy],
    *,
    blocks: int = 24,
    problems: int = 300,
    samples: int = 2,
    spread: float = 0.03,
    skills: tuple[float, float] = (0.05, 0.6),
    draw: int = 0,
    **fields: Any,
) -> Comparison:
    """A comparison of arms after bases of evenly spread skill, an arm `base` included; one seed each.

    Args:
        spread: standard deviation of an arm's true accuracy between blocks of the same skill.
        draw: of all chance.
        fields: of the comparison.
    """
    rng = np.random.default_rng(draw)
    runs = []
    skill = np.linspace(*skills, blocks)
    for place, own in enumerate(skill):
        for name, accuracy in {"base": lambda s: s, **arms}.items():
            chance = np.clip(accuracy(own) + (rng.normal(0, spread) if name != "base" else 0), 0, 1)
            right = {column: rng.binomial(samples, chance, problems).tolist() for column in COLUMNS}
            runs.append(make_run(name, f"b{place}", 0, right, samples))
    names = ["base", *arms]
    given: dict[str, Any] = {
        "name": "map",
        "description": "made-up blocks",
        "reference": names[1],
        "budget": "1e12 FLOPs",
        "covariate": {"arm": "base", "column": "skill", "title": "accuracy before training"},
    } | fields
    return Comparison(
        bases=tuple(f"b{place}" for place in range(blocks)),
        seeds=(0,),
        columns=COLUMNS,
        arms=tuple(Arm(name, name.upper(), kind="rl" if name != "base" else "") for name in names),
        runs=tuple(runs),
        **given,
    )


def contrast(name: str, arm: str, other: str | list[str], expect: str = "higher", **fields: Any) -> dict[str, Any]:
    """A contrast as a recipe has it; a primary one."""
    return {"name": name, "arm": arm, "other": other, "expect": expect, "primary": True, **fields}

"""Write the comparisons beside the study, from study.toml: the same arms and settings, with the one thing that differs.

Run:  python studies/map/variants.py        (writes pilot.toml, demonstrations.toml, ... into this folder)
"""

from __future__ import annotations

import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any

from thence.toml import to_toml

HERE = Path(__file__).parent
CONTRASTED = ["base", "sft", "sft-faulty", "sft-then-rl", "rl", "luffy", "hpt", "prefix-rft", "srft", "trapo", "relift"]
MAIN = ["base", "sft", "sft-then-rl", "rl", "luffy", "hpt"]
FOUR = ("faint", "fair", "good", "top")
Study = dict[str, Any]


def variant(study: Study, name: str, description: str, bases: dict[str, list[int]], arms: list[str]) -> Study:
    """The study with other blocks and fewer arms, without what is registered.

    Args:
        bases: level of skill to its seeds.
        arms: those kept, in the order of the study.
    """
    made = deepcopy(study)
    made |= {"name": f"map-{name}", "description": description, "registered": False}
    tuned = {level: base for level, base in made["bases"].items() if base["seeds"] == []}
    made["bases"] = tuned | {level: made["bases"][level] | {"seeds": seeds} for level, seeds in bases.items()}
    made["arms"] = {arm: table for arm, table in made["arms"].items() if arm in arms}
    for table in ("covariate", "contrasts", "power", "sections"):
        del made[table]
    return made


def four(seed: int) -> dict[str, list[int]]:
    """One new block at each of four levels of skill."""
    return {level: [seed + place] for place, level in enumerate(FOUR)}


def pilot(study: Study) -> Study:
    """A block of every level for the spread between blocks: never reported."""
    levels = [level for level, base in study["bases"].items() if base["seeds"]]
    blocks = {level: [900 + place] for place, level in enumerate(levels)}
    return variant(study, "pilot", "Spread between blocks, for the power of the study", blocks, CONTRASTED)


def budget(study: Study, name: str, factor: float, seed: int) -> Study:
    """Another budget; SFT takes the same share of it."""
    made = variant(study, name, f"The map's arms at {factor:g} times the budget", four(seed), MAIN)
    made["budget"] = {"flops": study["budget"]["flops"] * factor}
    made["sft"]["steps"] = round(study["sft"]["steps"] * factor)
    return made


def sampling(study: Study) -> Study:
    """Temperature 1 beside 0.6, and eight responses a problem for pass@8."""
    made = variant(study, "sampling", "The map's arms at T = 0.6 and 1, eight responses a problem", four(1200), MAIN)
    made["eval"] |= {"temperatures": [0.6, 1.0], "samples": 8}
    made["eval"]["splits"] = {name: split | {"limit": 200} for name, split in study["eval"]["splits"].items()}
    return made


def wider(study: Study) -> Study:
    """A model of 1.5 times the width, tuned on wider bases of its own.

    Its layers have 2.25 times the parameters, and so it gets 2.25 times the budget: about as many tokens. With the
    study's budget nothing would be left after SFT.
    """
    made = variant(study, "wider", "The map's arms with a wider model", four(1300), MAIN)
    made["budget"] = {"flops": study["budget"]["flops"] * 1.5**2}
    for base in made["bases"].values():
        base["settings"] |= {"model.init.hidden_size": 192, "model.init.intermediate_size": 528}
    return made


def replication(study: Study) -> Study:
    """Two blocks of other seeds: do they fall where the study says?"""
    return variant(study, "replication", "Two more blocks", {"low": [1400], "high": [1401]}, CONTRASTED)


def demonstrations(study: Study) -> Study:
    """How many demonstrations, and how good: as many rows are trained in every arm."""
    seeds = {"low": [1500, 1501, 1502], "mid": [1503, 1504, 1505], "top": [1506, 1507, 1508]}
    arms = ["base", "sft", "sft-then-rl", "rl", "luffy"]
    made = variant(study, "demonstrations", "Number and quality of the demonstrations", seeds, arms)
    kinds = {"256": {"limit": 256}, "4096": {"limit": 4096}}
    kinds |= {
        name: {"limit": 1024, "source": [f"world:chain?{world}"]}
        for name, world in (("careful", "expert=careful"), ("hasty", "expert=hasty"), ("wrong", "wrong=0.2"))
    }
    for kind, data in kinds.items():
        made["arms"][f"sft-{kind}"] = _with_data(study["arms"]["sft"], "sft", kind, data)
        after = _with_data(study["arms"]["sft-then-rl"], "sft-then-rl", kind, {})
        made["arms"][f"sft-then-rl-{kind}"] = after | {"after": f"sft-{kind}"}
        if "source" in data:  # LUFFY sees no more than 112 demonstrations: only their quality can matter to it
            rows = study["rl"]["data"] | {"source": data["source"]}
            made["arms"][f"luffy-{kind}"] = _with_data(study["arms"]["luffy"], "luffy", kind, rows)
    return made


def _with_data(table: dict[str, Any], arm: str, kind: str, data: dict[str, Any]) -> dict[str, Any]:
    made = {key: value for key, value in table.items() if key not in ("grid", "after", "settings")} | {"like": arm}
    settings = table.get("settings", {}) | ({"data": data} if data else {})
    return made | {"title": f"{table['title']}, {kind}", "settings": settings}


def made_from(study: Study) -> list[Study]:
    """All of them."""
    made = [pilot(study), budget(study, "half", 0.5, 1000), budget(study, "double", 2, 1100), sampling(study)]
    return [*made, wider(study), replication(study), demonstrations(study)]


def main() -> None:
    """Write them all."""
    for comparison in made_from(tomllib.loads((HERE / "study.toml").read_text())):
        name = comparison["name"].removeprefix("map-")
        head = f"# Written by variants.py. Run it with:  thence compare studies/map/{name}.toml\n"
        (HERE / f"{name}.toml").write_text(head + to_toml(comparison))


if __name__ == "__main__":
    main()

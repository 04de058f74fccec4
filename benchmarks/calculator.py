"""How much of what the recipe `calculator` learns is the calculator's: the same recipe with it and without it.

    python benchmarks/calculator.py [--seeds 0 1 2] [--out benchmarks/results/calculator.json]

Without it a rollout is one turn that `exact` grades, and the demonstrations of SFT are whole: none ends at a call.
Base, prompts, steps, problems and limits are the same. Seeds pair the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import tomllib
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from common import machine

from thence.toml import to_toml

RECIPE = files("thence") / "recipes" / "calculator.toml"
STAGES = ("eval-sft", "eval-rl")
SUMMED = ("flops", "executed_flops", "seconds")
"""Over the steps of RL."""


def without(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with single turns."""
    plain = {
        key: {k: v for k, v in table.items() if k != "environment"} if isinstance(table, dict) else table
        for key, table in recipe.items()
    }
    plain["sft"]["data"] = {**plain["sft"]["data"], "source": ["world:chain"]}
    plain["rl"]["reward"] = plain["eval"]["reward"] = "exact"
    return plain


def measured(recipe: dict[str, Any], folder: Path, seed: int) -> dict[str, Any]:
    """Accuracy after SFT and after RL, by test set; turns and FLOPs of RL."""
    file = folder.with_suffix(".toml")
    file.write_text(to_toml(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "thence", "run", str(file), "--seed", str(seed), "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    steps = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in steps if line["kind"] == "rl"]
    scores = {}
    for stage in STAGES:
        rows = json.loads((folder / "stages" / stage / "result.json").read_text())["rows"]
        scores[stage] = {row["split"]: row["accuracy"] for row in rows}
    sums = {key: sum(line[key] for line in steps) for key in SUMMED if key in steps[0]}
    return {"seed": seed, "scores": scores, "steps": len(steps), "rl": sums}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    recipe = tomllib.loads(RECIPE.read_text(encoding="utf-8"))
    arms = {"calculator": recipe, "none": without(recipe)}
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as folder:
        for seed in given.seeds:
            for arm, tables in arms.items():
                runs[arm].append(measured(tables, Path(folder) / f"{arm}-{seed}", seed))
                print(arm, runs[arm][-1], flush=True)
    means = {
        arm: {
            stage: {
                split: statistics.fmean(run["scores"][stage][split] for run in found)
                for split in found[0]["scores"][stage]
            }
            for stage in STAGES
        }
        for arm, found in runs.items()
    }
    command = ["python", *sys.argv]
    record = {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "means": means,
        "runs": runs,
    }
    if given.out is not None:
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(means, indent=1))


if __name__ == "__main__":
    main()

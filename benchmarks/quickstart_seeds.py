"""Run the quickstart with several seeds and judge it: SFT must beat the base and RL must beat SFT, each by more than
the interval, on held-out problems of the same kind. Writes the evidence as JSON; exits with 1 if a seed fails.

    python benchmarks/quickstart_seeds.py [--seeds 0 1 2 3 4] [--threads 1] [--jobs 2] [--out FILE.json]

Each seed changes the order of the data, the problems that RL draws, every sampled token and the evaluation's samples;
the base is the shipped one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from common import machine

STAGES = ("eval-base", "eval-sft", "eval-rl")
IN_DISTRIBUTION = "in-distribution"


def run_seed(seed: int, folder: Path, threads: int, recipe: str) -> dict:
    """One run of the recipe in a fresh process; its results, judgements and times."""
    target = folder / f"{recipe}-seed{seed}"
    command = [sys.executable, "-m", "thence", "run", recipe, "--seed", str(seed), "--folder", str(target), "--restart"]
    start = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, stdout=subprocess.DEVNULL)
    rows = {name: json.loads((target / "stages" / name / "result.json").read_text())["rows"] for name in STAGES}
    metrics = [json.loads(line) for line in (target / "metrics.jsonl").read_text().splitlines()]
    seconds = {kind: sum(m["seconds"] for m in metrics if m["kind"] == kind) for kind in ("sft", "rl")}
    return {
        "seed": seed,
        "seconds_total": round(time.perf_counter() - start, 1),
        "seconds_training": {kind: round(value, 1) for kind, value in seconds.items()},
        "results": rows,
        "judgements": judge(rows),
    }


def judge(rows: dict[str, list[dict]]) -> list[dict]:
    """For each temperature: is the lower end of the later interval above the upper end of the earlier one?"""
    found = []
    for before, after in itertools.pairwise(STAGES):
        for old, new in zip(rows[before], rows[after], strict=True):
            found.append(
                {
                    "split": new["split"],
                    "temperature": new["temperature"],
                    "comparison": f"{after} over {before}",
                    "gain": new["accuracy"] - old["accuracy"],
                    "intervals_apart": new["low"] > old["high"],
                }
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--out", type=Path, default=Path("docs/evidence/quickstart-seeds.json"))
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        seeds = list(pool.map(lambda seed: run_seed(seed, args.runs, args.threads, args.recipe), args.seeds))
    wanted = [j for s in seeds for j in s["judgements"] if j["split"] == IN_DISTRIBUTION]
    held = all(j["intervals_apart"] for j in wanted)
    record = {
        "command": "python " + " ".join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "threads_per_run": args.threads,
        "runs_side_by_side": args.jobs,
        "every_step_beats_the_one_before": held,
        "seeds": seeds,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for entry in seeds:
        for row in (r for name in STAGES for r in entry["results"][name] if r["split"] == IN_DISTRIBUTION):
            print(
                entry["seed"], row["temperature"], f"{100 * row['accuracy']:.1f} [{row['low']:.3f}, {row['high']:.3f}]"
            )
    print("every step beats the one before:", held, "->", args.out)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())

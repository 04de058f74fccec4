"""RL with the next rollout batch sampled while this one is trained (`rl.ahead`), beside RL that takes turns.

    python benchmarks/async_rl.py [--seeds 0 1 2 3 4] [--tokens 2000000] [--threads 1] --out FILE.json

Every seed has one SFT model, from which RL starts in each arm, in fresh processes, one after the other; every second
seed in the other order. All end at the same number of trained tokens. The arms: `in-step` (ahead = 0, as it is by
default), `in-step-weighed` (the same with the importance weights of ahead = 1, and their forward pass), `ahead-1`.
The trainer has so many threads, and so has the process that samples: two cores are busy in `ahead-1`, one in the
others. The machine must be idle.

The record has for each seed and arm: seconds of a step (median, without the first), the share of it that waited for
responses, seconds of the whole stage, age of the weights that sampled, importance weights, what was sampled and never
trained, and accuracy on the embedded world's held-out problems. Then the differences to each other arm, seed by seed,
with their mean and its standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import machine

COMPARED = ("step_seconds", "stage_seconds", "accuracy")
ARMS: dict[str, list[str]] = {
    "in-step": [],
    "in-step-weighed": ["--rl.importance-bound", "2"],
    "ahead-1": ["--rl.ahead", "1"],
}


def thence(threads: int, *flags: str) -> float:
    """Run the quickstart's recipe with these flags. Returns the seconds that it took."""
    command, start = [sys.executable, "-m", "thence", "run", "quickstart", *flags], time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measured(folder: Path, seed: int, arm: str, given: argparse.Namespace) -> dict[str, Any]:
    """One run of RL from the seed's SFT model, and what its files say."""
    target = folder / f"rl-seed{seed}-{arm}"
    flags = ["--stages", '["rl", "eval-rl"]', "--model.path", str(folder / f"sft-seed{seed}/stages/sft/model")]
    flags += ["--seed", str(seed), "--folder", str(target), *ARMS[arm]]
    flags += ["--rl.tokens", str(given.tokens), "--rl.steps", "100000", *given.flag]
    seconds = thence(given.threads, *flags)
    lines = [json.loads(row) for row in (target / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "rl"]
    rows = json.loads((target / "stages/eval-rl/result.json").read_text())["rows"]
    later = steps[1:] or steps

    def mean(key: str) -> float | None:
        values = [line[key] for line in later if line.get(key) is not None]
        return statistics.fmean(values) if values else None

    return {
        "seed": seed,
        "arm": arm,
        "steps": len(steps),
        "trained_tokens": sum(line["trained_tokens"] for line in steps),
        "step_seconds": statistics.median(line["seconds"] for line in later),
        "stage_seconds": sum(line["seconds"] for line in steps),
        "process_seconds": seconds,
        **{key: mean(key) for key in ("waited_share", "staleness", "importance", "importance_cut", "mismatch_kl")},
        **{key: steps[-1].get(key, 0) for key in ("wasted_batches", "wasted_tokens")},
        "reward": [line["reward"] for line in steps],
        "accuracy": statistics.fmean(row["accuracy"] for row in rows),
        "results": rows,
    }


def differences(found: list[dict[str, Any]], arm: str, other: str) -> dict[str, Any]:
    """Of the runs of an arm to those of another, over seeds; for times, of their logarithms."""
    result: dict[str, Any] = {"arm": arm, "to": other}
    for key in COMPARED:
        values = {(run["seed"], run["arm"]): run[key] for run in found}
        pairs = [(values[seed, arm], values[seed, other]) for seed, of in values if of == arm]
        each = [math.log(a / b) if key.endswith("seconds") else a - b for a, b in pairs]
        error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else None
        result[key] = {"each": each, "mean": statistics.fmean(each), "standard_error": error}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tokens", type=int, default=2_000_000, help="trained tokens of RL")
    parser.add_argument("--threads", type=int, default=1, help="of the trainer, and of the process that samples")
    parser.add_argument("--flag", action="append", default=[], help="a flag of the recipe, for a smaller trial")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, seed in enumerate(given.seeds):
            sft = ["--stages", '["sft"]', "--seed", str(seed), "--folder", str(folder / f"sft-seed{seed}")]
            thence(given.threads, *sft, *(flag for flag in given.flag if not flag.startswith(("--rl", "--eval"))))
            for arm in ARMS if number % 2 == 0 else reversed(ARMS):
                found.append(measured(folder, seed, arm, given))
                print({key: value for key, value in found[-1].items() if key not in ("reward", "results")}, flush=True)
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "threads": given.threads,
        "tokens": given.tokens,
        "flags": given.flag,
        "runs": found,
        "differences": [differences(found, "ahead-1", other) for other in list(ARMS)[:2]],
    }
    if given.out is not None:
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

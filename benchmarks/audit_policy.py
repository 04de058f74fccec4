"""Audit an independent GRPO loop: clean with random objectives, and with every mistake on random probes.

    python benchmarks/audit_policy.py [--clean 500] [--each 50] [--write]

A clean loop must have no finding, a mistake must be named and nothing else be found. Every seed has its own probe:
model, texts, noise of the sampler. ``--write`` keeps the counts in benchmarks/results/audit-policy.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import thence  # noqa: E402
from tests.audit.policy_cases import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    MISTAKES,
    audit,
    judge_of,
    random_objective,
)

RESULTS = ROOT / "benchmarks" / "results" / "audit-policy.json"


def main() -> None:
    """Run both campaigns and print what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clean", type=int, default=500)
    parser.add_argument("--each", type=int, default=50)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failures: list[dict[str, Any]] = []
    named = dict.fromkeys(MISTAKES, 0)
    silent = 0
    with tempfile.TemporaryDirectory() as name:
        for seed in range(max(options.clean, options.each)):
            judge_of.cache_clear()
            if seed < options.clean:
                silent += one(Path(name), random_objective(seed), "", set(), seed, failures)
            for mistake, (asked, finding) in MISTAKES.items() if seed < options.each else ():
                named[mistake] += one(Path(name), asked, mistake, {finding}, seed, failures)
            print(f"probe {seed}: {silent} clean ones silent, {sum(named.values())} named, {len(failures)} wrong")
    record = {
        "thence": thence.__version__,
        "torch": torch.__version__,
        "clean": {"silent": silent, "of": options.clean},
        "mistakes": {mistake: {"named": count, "of": options.each} for mistake, count in named.items()},
        "wrong": failures,
    }
    if options.write:
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(failures))


def one(
    folder: Path, asked: dict[str, Any], mistake: str, due: set[str], seed: int, failures: list[dict[str, Any]]
) -> bool:
    """Audit one loop. Returns whether exactly what is due was found."""
    result = audit(folder, asked, mistake, seed)
    found = {fault.id for fault in result.faults}
    right = result.status == "judged" and found == due
    if not right:
        said = [fault.detail for fault in result.faults]
        failures.append(
            {"seed": seed, "mistake": mistake, "asked": asked, "found": sorted(found), "said": said}
            | {"reason": result.reason}
        )
        print("wrong:", failures[-1])
    return right


if __name__ == "__main__":
    main()

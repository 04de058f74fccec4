"""Compare two benchmark commands in alternation, each run in a fresh process: ours, peer, ours, peer, ...

    python benchmarks/compare.py --ours 'CMD' --peer 'CMD' --pairs 5 --metric tokens_per_s --out results/x.json

A command prints a JSON object as the last line of its standard output. The ratio is ours / peer, pair by pair, so that
a machine that slows down in the middle slows both. The two sides must report the same `workload`. Needs Python only.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Refused(Exception):
    """A comparison that would not be worth its figures: the message says why."""


def run_once(command: str) -> dict[str, Any]:
    """Run `command` (no shell) and return the JSON object that it prints last. Raises Refused if there is none."""
    start = time.perf_counter()
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        raise Refused(f"exit code {done.returncode} from: {command}\n{done.stderr[-2000:]}")
    try:
        record = json.loads(lines[-1])
    except json.JSONDecodeError as error:
        raise Refused(f"the last line printed is not JSON ({error}): {command}") from error
    if not isinstance(record, dict):
        raise Refused(f"the last line printed is not a JSON object: {command}")
    return record | {"process_seconds": round(time.perf_counter() - start, 2)}


def number(record: dict[str, Any], metric: str) -> float:
    """A metric of one run; a list, such as `step_seconds`, counts by its median. Raises Refused if it is missing."""
    value = record.get(metric)
    if isinstance(value, list) and value:
        value = statistics.median(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise Refused(f"{record.get('tool', 'a command')} reports no positive number {metric!r}: {value!r}")
    return float(value)


def check_same(ours: dict[str, Any], peer: dict[str, Any], keys: list[str], tolerance: float) -> None:
    """Raise Refused unless both did the same work: equal `workload`, and `keys` equal to a relative `tolerance`."""
    if "workload" not in ours or ours["workload"] != peer.get("workload"):
        raise Refused(f"different workloads:\n  ours {ours.get('workload')}\n  peer {peer.get('workload')}")
    for key in keys:
        a, b = ours.get(key), peer.get(key)
        if not isinstance(a, (int, float)) or not isinstance(b, (int, float)) or abs(a - b) > tolerance * abs(b):
            raise Refused(f"{key} differs by more than {tolerance:g}: ours {a}, peer {b}")


def summarise(pairs: list[tuple[dict[str, Any], dict[str, Any]]], metric: str) -> dict[str, Any]:
    """Median of each side, the ratio ours / peer of every pair, and their median, least and greatest."""
    ours, peer = [number(a, metric) for a, _ in pairs], [number(b, metric) for _, b in pairs]
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    return {
        "ours_median": statistics.median(ours),
        "peer_median": statistics.median(peer),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Run the pairs and return the record that is kept under `benchmarks/results/`."""
    started, load = datetime.datetime.now(datetime.UTC), os.getloadavg()[0]
    pairs = []
    for index in range(args.pairs):
        pair = run_once(args.ours), run_once(args.peer)
        check_same(*pair, keys=args.same, tolerance=args.tolerance)
        pairs.append(pair)
        figures = ", ".join(f"{m} {number(pair[0], m):.5g} / {number(pair[1], m):.5g}" for m in args.metric)
        print(f"pair {index + 1} of {args.pairs}: {figures}", file=sys.stderr)
    return {
        "date": started.isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "ours": args.ours,
        "peer": args.peer,
        "load_average_before": load,
        "metrics": {metric: summarise(pairs, metric) for metric in args.metric},
        "runs": [{"ours": ours, "peer": peer} for ours, peer in pairs],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", required=True, metavar="CMD")
    parser.add_argument("--peer", required=True, metavar="CMD")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--metric", action="append", help="may be given several times; default tokens_per_s")
    parser.add_argument("--same", action="append", default=[], metavar="KEY", help="a number both sides must agree on")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="relative, for --same")
    parser.add_argument("--out", type=Path, help="file for the record")
    args = parser.parse_args()
    args.metric = args.metric or ["tokens_per_s"]
    if args.pairs < 1:
        parser.error("--pairs: at least 1")
    try:
        record = compare(args)
    except Refused as error:
        print(f"no comparison: {error}", file=sys.stderr)
        return 2
    for metric, figures in record["metrics"].items():
        spread = f"{figures['ratio_min']:.3f} to {figures['ratio_max']:.3f} over {args.pairs} pairs"
        print(
            f"{metric}: ours {figures['ours_median']:.5g}, peer {figures['peer_median']:.5g}, "
            f"ours / peer {figures['ratio_median']:.3f} ({spread})"
        )
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

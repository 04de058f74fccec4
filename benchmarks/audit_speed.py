"""How long `thence audit` takes and how much memory, for real stacks: writes benchmarks/results/audit-speed.json.

    .venv/bin/python benchmarks/audit_speed.py ENVIRONMENTS [NAME:ADAPTER ...] [--only quick|matrix]

ENVIRONMENTS is the folder that benchmarks/audit_targets/environments.sh filled, NAME one of its environments (`.`: the
one that runs thence); the default list is STACKS. Each audit is a process of its own, as a user would start it. Its
wall time runs from start to end, thence's own imports included; what the stack's imports took, as the report says, is
taken off: `beyond_import_s`. Memory is the sum of the resident sets of all its processes, sampled twice a second (pages
that processes share count once in each); `memory_shared_once_mb` counts those once. The load average stands beside:
other work on the machine makes every figure larger.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "audit-speed.json"
STACKS = (
    "trl:transformers", "trl:accelerate", "trl:trl-sft", "trl:trl-grpo", "ds019:deepspeed", "orl0112:openrlhf-sft",
    "lf095:llamafactory-sft", "verl091:verl-sft", ".:thence",
)  # fmt: skip
LIMITS = {"quick": 20.0, "matrix": 180.0}
"""Seconds beyond the stack's imports that an audit may take on two cores."""
MEMORY_MB = 2048


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("environments", type=Path)
    parser.add_argument("stacks", nargs="*", default=list(STACKS), metavar="NAME:ADAPTER")
    parser.add_argument("--only", choices=list(LIMITS), help="one of the two matrices")
    args = parser.parse_args()
    old = json.loads(RESULT.read_text(encoding="utf-8"))["audits"] if RESULT.exists() else []
    found = {(row["adapter"], row["matrix"]): row for row in old}
    for stack in args.stacks:
        environment, adapter = stack.split(":")
        for matrix in [args.only] if args.only else list(LIMITS):
            python = None if environment == "." else args.environments / environment / "bin" / "python"
            if python is not None and not python.exists():
                print(f"{adapter}: no {python}", flush=True)
                continue
            try:
                row = measure(adapter, python, matrix)
            except RuntimeError as error:
                print(f"{adapter} {matrix}: {error}", flush=True)
                continue
            found[adapter, matrix] = row
            print(json.dumps(row), flush=True)
            write(list(found.values()))


def measure(adapter: str, python: Path | None, matrix: str) -> dict[str, Any]:
    """One audit in a process of its own.

    Returns:
        Seconds of wall time, of the stack's imports and beyond them, of thence's own start, and megabytes at the peak.

    Raises:
        RuntimeError: the audit wrote no report.
    """
    words = [sys.executable, "-m", "thence", "audit", adapter, "--quiet"]
    words += ["--python", str(python)] if python else []
    words += ["--quick"] if matrix == "quick" else []
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        start = time.monotonic()
        process = subprocess.Popen([*words, "--json", str(out)], env={**os.environ, "OMP_NUM_THREADS": "1"})
        peak, peak_once = 0.0, 0.0
        while process.poll() is None:
            resident, once = memory_mb(process.pid)
            peak, peak_once = max(peak, resident), max(peak_once, once)
            time.sleep(0.5)
        wall = time.monotonic() - start
        if not out.exists():
            raise RuntimeError(f"no report after {wall:.0f} s, exit code {process.returncode}")
        report = json.loads(out.read_text(encoding="utf-8"))
    judged = sum(case["status"] == "judged" for case in report["cases"])
    shown = ["thence", "audit", adapter, *(["--python", f"{python.parts[-3]}/bin/python"] if python else [])]
    return {
        "adapter": adapter,
        "matrix": matrix,
        "command": shlex.join([*shown, *(["--quick"] if matrix == "quick" else [])]),
        "versions": report["versions"],
        "verdict": report["verdict"]["outcome"],
        "cases_judged": judged,
        "cases": len(report["cases"]),
        "wall_s": round(wall, 1),
        "stack_import_s": report["import_seconds"],
        "beyond_import_s": round(wall - report["import_seconds"], 1),
        "limit_s": LIMITS[matrix],
        "thence_start_s": round(wall - report["seconds"], 1),
        "cases_s": round(sum(case["seconds"] for case in report["cases"]), 1),
        "peak_memory_mb": round(peak),
        "peak_memory_shared_once_mb": round(peak_once),
        "memory_limit_mb": MEMORY_MB,
        "load_average_before": round(load, 1),
        "load_average_after": round(os.getloadavg()[0], 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def memory_mb(root: int) -> tuple[float, float]:
    """Resident set of a process and all below it, megabytes: pages shared among them in each, and once."""
    resident = proportional = 0
    for pid in tree(root):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
        resident += sizes.get("Rss", 0)
        proportional += sizes.get("Pss", 0)
    return resident / 1024, proportional / 1024


def tree(root: int) -> list[int]:
    """A process and those below it, by /proc."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                # Behind the name in parentheses: state, then the parent.
                parent = int((folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(folder.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def write(audits: list[dict[str, Any]]) -> None:
    record = {
        "command": "benchmarks/audit_speed.py ENVIRONMENTS",
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()},
        "audits": sorted(audits, key=lambda row: (row["matrix"] != "quick", row["adapter"])),
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()

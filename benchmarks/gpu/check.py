"""Run thence on a GPU, part by part, and say what holds. `check.sh` sets the environment and calls this.

Every part runs in a process of its own, prints one line a check and a last line, and writes OUT/gpu-<part>.json with
the environment, the figures and the verdicts. OUT/gpu-checks.jsonl has one line a check and a figure of all parts. The
exit code is 1 where a check failed or a part broke.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

from record import Record, environment

PARTS = {
    "correctness": "the step on the GPU against float64 on the CPU",
    "sampler": "log-probabilities, seeds, greedy, mismatch",
    "ranks": "NCCL with one process; two processes on one device",
    "pipeline": "a recipe end to end, killed and resumed",
    "head": "the fused output layer by size of a chunk, at 152 thousand words",
    "speed": "models of real size: SFT, GRPO, sampling, memory",
    "audit": "thence audit thence",
    "suite": "the tests of the repository that are not slow",
}


def main() -> int:
    """Run the chosen parts. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=Path("gpu-check"), help="folder of the JSON files")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run of the script itself")
    parser.add_argument("--small", action="store_true", help="fewer cases and smaller models")
    parser.add_argument("--seconds", type=int, default=420, help="time limit of one part")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.child:
        return run_part(args.parts[0], args)
    (args.out / "gpu-checks.jsonl").write_text("", encoding="utf-8")
    failed = [part for part in args.parts if start_part(part, args)]
    print(f"parts that failed: {', '.join(failed) or 'none'} of {len(args.parts)}; the files are in {args.out}")
    return 1 if failed else 0


def start_part(part: str, args: argparse.Namespace) -> int:
    """Run a part in a process of its own. Returns its exit code."""
    command = [sys.executable, __file__, str(args.out), "--parts", part, "--device", args.device, "--child"]
    print(f"== {part}: {PARTS[part]}", flush=True)
    try:
        code = subprocess.run(command + ["--small"] * args.small, timeout=args.seconds).returncode
    except subprocess.TimeoutExpired:
        print(f"== {part}: not done after {args.seconds} s")
        return 1
    if code < 0:
        print(f"== {part}: ended by signal {-code}")
    return code


def run_part(part: str, args: argparse.Namespace) -> int:
    """The child's side: run the part here and write its file, also where it breaks."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU here; --device cpu makes a dry run")
        return 1
    record, start = Record(part), time.perf_counter()
    try:
        importlib.import_module(f"part_{part}").run(torch.device(args.device), args.small, record)
    except BaseException as error:
        record.broke(error)
        if not isinstance(error, Exception):
            raise
    finally:
        seconds = round(time.perf_counter() - start, 1)
        plain = {"part": part, "environment": environment(args.device), "seconds": seconds, **record.plain()}
        (args.out / f"gpu-{part}.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
        with (args.out / "gpu-checks.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"part": part, **line}) + "\n" for line in record.lines())
    print(f"== {part}: {record.summary()}, {seconds} s", flush=True)
    return 1 if record.failed else 0


if __name__ == "__main__":
    sys.exit(main())

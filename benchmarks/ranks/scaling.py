"""Weak scaling: tokens a second of two ranks beside twice those of one, each with as many rows, in alternation.

    python benchmarks/ranks/scaling.py --model DATA/small --data DATA/small-sft.jsonl --pairs 3

One thread a rank. The machine must be idle and have a core for each rank.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from compare import number, run_once  # noqa: E402


def command(args: argparse.Namespace, ranks: int) -> str:
    """The command that trains on so many ranks."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    flags = ["--model", str(args.model), "--data", str(args.data), "--steps", str(args.steps), "--warmup", "1"]
    flags += ["--threads", "1", "--packing", "--parallel", args.parallel]
    flags += ["--micro-batch", str(args.micro_batch), "--accumulation", str(args.accumulation)]
    return shlex.join([sys.executable, *launch, str(HERE.parent / "ours_sft.py"), *flags])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--parallel", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=8, help="times micro-batch: rows of a rank in one step")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    pairs = []
    for _ in range(args.pairs):
        one, two = run_once(command(args, 1)), run_once(command(args, 2))
        pairs.append(
            {"one": one, "two": two, "efficiency": number(two, "tokens_per_s") / number(one, "tokens_per_s") / 2}
        )
        print(f"{pairs[-1]['efficiency']:.3f} of twice one rank", file=sys.stderr)
    found = sorted(pair["efficiency"] for pair in pairs)
    print(f"weak scaling, {args.parallel}: {found[len(found) // 2]:.3f} ({found[0]:.3f} to {found[-1]:.3f})")
    if args.out is not None:
        record = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "pairs": pairs}
        record |= {"command": shlex.join([Path(sys.executable).name, *sys.argv]), "efficiency": found}
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

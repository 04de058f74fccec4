"""`python -m tests.bad_inputs`: a campaign of bad inputs, or one case again."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch

from .ground import Ground, make_ground
from .harness import campaign, counted, failure, one
from .kinds import KINDS

MEMORY = 16 * 2**30
"""Bytes of address space: a bad size must not take the machine down."""


def command() -> int:
    """Returns 1 where a case failed that shows no known fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.bad_inputs", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the counts and failures go, as JSON")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="one case")
    args = parser.parse_args()
    torch.set_num_threads(1)
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # a bad name must not reach the network
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bad-inputs-") as name:
        work = Path(name)
        ground = make_ground(work / "ground", with_comparison=not args.only or args.only.startswith("comparison"))
        if args.only:
            kind, _, number = args.only.partition(":")
            ended = one(KINDS, kind, int(number), ground, work, args.seed)
            print(json.dumps(failure(kind, int(number), args.seed, ended), indent=1))
            return 1 if ended.wrong else 0
        result = {"seed": args.seed, **counted(_side_by_side(args, ground, work))}
    result["seconds"] = round(time.monotonic() - started)
    print(json.dumps({key: result[key] for key in ("cases", "kinds", "failed", "known_faults", "seconds")}, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["failed"] else 0


def _side_by_side(args: argparse.Namespace, ground: Ground, work: Path) -> Iterator[Any]:
    """The cases, dealt to processes in rounds over all kinds."""
    rounds = [range(at, min(at + len(KINDS), args.cases)) for at in range(0, args.cases, len(KINDS))]
    with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
        for done in pool.imap(partial(_round, ground, work, args.seed), rounds):
            yield from done


def _round(ground: Ground, work: Path, seed: int, numbers: range) -> list[Any]:
    return list(campaign(KINDS, ground, work / str(os.getpid()), numbers, seed, partial(print, flush=True)))


if __name__ == "__main__":
    sys.exit(command())

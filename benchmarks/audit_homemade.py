"""Audit home-made trainers with mistakes that a generator composes, and clean ones beside them.

    python benchmarks/audit_homemade.py [--bugs 60] [--clean 24] [--seed 0] [--write]

A bug is one to three mistakes of mask, weight, order, scale and state, drawn by the seed, in a step for
``thence.audit.check``; one that moves the model as the right step does in every cut is no bug and is drawn again. None
may end with exit code 0. ``--write`` keeps the table in benchmarks/results/audit-homemade.json, line by line; lines
that stand there already are not run again, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import thence  # noqa: E402
from tests.audit.homemade import HomeMade  # noqa: E402  # pyright: ignore[reportMissingImports]
from tests.tiny_model import make_tiny_model  # noqa: E402  # pyright: ignore[reportMissingImports]
from thence.audit import check, random_rows  # noqa: E402
from thence.audit.judge.cuts import difference, first_update  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "audit-homemade.json"
MISTAKES: dict[str, list[dict[str, Any]]] = {
    "mask": [
        {"extra": "padding"},
        {"extra": "prompt"},
        {"layout": "packed", "extra": "boundary"},
        {"layout": "packed", "masked": False},
        {"layout": "left", "masked": False},
        {"missing": "first"},
        {"missing": "end"},
        {"missing": "late"},
    ],
    "weight": [{"weight": "micro-batch"}, {"weight": "rows"}, {"weight": "probability"}],
    "order": [{"order": "labels"}],
    "scale": [{"times": 0.0}, {"times": 0.5}, {"times": 2.0}, {"scale": 0.5}, {"scale": "accumulation"}],
    "state": [{"every": True}, {"lost": "first"}, {"lost": "last"}, {"dropped": "embed_tokens"}, {"dropped": "norm"}],
}
FAMILIES = ("llama", "qwen2", "gpt2", "mistral", "olmo2", "gemma2")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bugs", type=int, default=60)
    parser.add_argument("--clean", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(arguments.seed)
    wanted = [drawn_bug(draw) for _ in range(arguments.bugs)]
    right = [drawn_clean(draw) for _ in range(arguments.clean)]
    table = kept() if arguments.write else {"bugs": [], "clean": []}
    for part, drawn in (("bugs", wanted), ("clean", right)):
        there = {json.dumps(key(line)) for line in table[part]}
        for step, family, seed in drawn:
            if json.dumps(key({"step": made(step), "family": family, "seed": seed})) in there:
                continue
            table[part].append(judged(step, family, seed))
            if arguments.write:
                keep(table, arguments)
    rows, clean = table["bugs"], table["clean"]
    codes = collections.Counter(row["exit"] for row in rows)
    alarms = [row for row in clean if row["exit"] != 0]
    print(f"bugs: exit {dict(sorted(codes.items()))}; clean: {len(alarms)} of {len(clean)} not acquitted")
    return int(bool(codes[0] or alarms))


def kept() -> dict[str, list[dict[str, Any]]]:
    """The lines of the table so far."""
    if not RESULTS.exists():
        return {"bugs": [], "clean": []}
    table = json.loads(RESULTS.read_text(encoding="utf-8"))
    return {"bugs": table["bugs"], "clean": table["clean"]}


def keep(table: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> None:
    """Write the table with what was asked for and what of it is done."""
    head = {
        "command": f"python benchmarks/audit_homemade.py --bugs {arguments.bugs} --clean {arguments.clean} "
        f"--seed {arguments.seed} --write",
        "thence": thence.__version__,
        "torch": torch.__version__,
        "done": {part: len(lines) for part, lines in table.items()},
        "exit codes of bugs": collections.Counter(str(line["exit"]) for line in table["bugs"]),
    }
    RESULTS.write_text(json.dumps({**head, **table}, indent=1) + "\n", encoding="utf-8")


def key(line: dict[str, Any]) -> list[Any]:
    """What makes a line of the table the same audit."""
    return [line["step"], line["family"], line["seed"]]


def made(step: HomeMade) -> dict[str, Any]:
    """The optimizer, and every field of a step that is not as it should be."""
    plain = asdict(HomeMade())
    return {name: value for name, value in asdict(step).items() if value != plain[name] or name == "optimizer"}


def drawn_bug(draw: random.Random) -> tuple[HomeMade, str, int]:
    """One to three mistakes of different kinds that show."""
    while True:
        kinds = draw.sample(list(MISTAKES), draw.choice((1, 1, 2, 3)))
        step = HomeMade(draw.choice(("sgd", "adamw")))
        for kind in kinds:
            step = replace(step, **draw.choice(MISTAKES[kind]))
        family, seed = draw.choice(FAMILIES), draw.randrange(10**6)
        if shows(step, family, seed):
            return step, family, seed


def drawn_clean(draw: random.Random) -> tuple[HomeMade, str, int]:
    """A right step."""
    step = HomeMade(draw.choice(("sgd", "adamw")), layout=draw.choice(("right", "left", "packed")))
    return step, draw.choice(FAMILIES[:3] if step.layout == "packed" else FAMILIES), draw.randrange(10**6)


def shows(step: HomeMade, family: str, seed: int) -> bool:
    """Whether the model moves elsewhere than with the right step in some cut."""
    right = HomeMade(step.optimizer)
    found = []
    for micro_batch in (8, 4, 1):
        updates = []
        for each in (right, step):
            model = make_tiny_model(torch.float32, family, seed)
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            each(model, rows_of(seed), micro_batch, 8 // micro_batch)
            after = {name: p.detach().clone() for name, p in model.named_parameters()}
            updates.append(first_update(before, after, range(8), 0.0, "float32"))
        apart = difference(*updates)
        found.append(apart.share > apart.allowed)
    return any(found) or bool(step.dropped)


def rows_of(seed: int) -> Sequence[Any]:
    """The rows of a probe."""
    return random_rows(40, seed)


def judged(step: HomeMade, family: str, seed: int) -> dict[str, Any]:
    """One line of the table."""
    start = time.perf_counter()
    model = make_tiny_model(torch.float32, family, seed)
    report = check(step, model=copy.deepcopy(model), lr=step.lr, batch=rows_of(seed))
    found = sorted({finding.id for case in report.cases for finding in case.faults})
    left = sum(case.status != "judged" for case in report.cases)
    line = {"step": made(step), "family": family, "seed": seed, "exit": report.verdict.exit_code, "found": found}
    line |= {"not judged": left, "seconds": round(time.perf_counter() - start, 1)}
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    sys.exit(main())

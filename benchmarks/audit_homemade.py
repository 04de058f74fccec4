"""Audit home-made trainers with mistakes that a generator composes, and clean ones beside them.

    python benchmarks/audit_homemade.py [--bugs 60] [--clean 24] [--seed 0] [--write]

A bug is one to three mistakes of mask, weight, order, scale and state, drawn by the seed, in a step for
``thence.audit.check``; one that moves the model as the right step does in every cut is no bug and is drawn again. None
may end with exit code 0. ``--write`` keeps the table in benchmarks/results/audit-homemade.json.
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
    rows = [judged(*drawn_bug(draw)) for _ in range(arguments.bugs)]
    clean = [judged(*drawn_clean(draw)) for _ in range(arguments.clean)]
    codes = collections.Counter(row["exit"] for row in rows)
    alarms = [row for row in clean if row["exit"] != 0]
    print(f"bugs: exit {dict(sorted(codes.items()))}; clean: {len(alarms)} of {len(clean)} not acquitted")
    if arguments.write:
        head = {
            "command": f"python benchmarks/audit_homemade.py --bugs {arguments.bugs} --clean {arguments.clean} "
            f"--seed {arguments.seed} --write",
            "thence": thence.__version__,
            "torch": torch.__version__,
        }
        text = json.dumps({**head, "exit codes of bugs": codes, "bugs": rows, "clean": clean}, indent=1)
        RESULTS.write_text(text + "\n", encoding="utf-8")
    return int(bool(codes[0] or alarms))


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
    plain = asdict(HomeMade())
    made = {key: value for key, value in asdict(step).items() if value != plain[key] or key == "optimizer"}
    found = sorted({finding.id for case in report.cases for finding in case.faults})
    left = sum(case.status != "judged" for case in report.cases)
    line = {"step": made, "family": family, "seed": seed, "exit": report.verdict.exit_code, "found": found}
    line |= {"not judged": left, "seconds": round(time.perf_counter() - start, 1)}
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    sys.exit(main())

"""How far the updates of one step lie apart if its rows are cut in another way: clean steps, and steps with a bug.

    python benchmarks/audit_cuts.py [--families 10] [--seeds 1] [--write]

The thresholds of the finding ``depends-on-cut`` (thence.audit.judge.cuts) must lie between the two. Every family and
optimizer takes one step on the same rows as 8 x 1, 2 x 4 and 1 x 8 (rows x micro-batches), in float32 and with
bfloat16 weights; what counts is the largest difference of a clean step and the smallest of a bug, by measure and
precision. ``--write`` keeps the record in benchmarks/results/audit-cuts.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import thence  # noqa: E402
from tests.audit.homemade import HomeMade  # noqa: E402  # pyright: ignore[reportMissingImports]
from tests.tiny_model import make_tiny_model  # noqa: E402  # pyright: ignore[reportMissingImports]
from thence.audit import random_rows  # noqa: E402
from thence.audit.judge.cuts import difference, first_update  # noqa: E402
from thence.audit.judge.walk import MANTISSA  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "audit-cuts.json"
FAMILIES = ("llama", "qwen2", "qwen3", "gpt2", "mistral", "olmo2", "gemma2", "gemma", "gpt_neox", "granite")
OPTIMIZERS = (
    "adamw", "sgd", "momentum", "adamw-linear", "adam-decayed", "adafactor", "rmsprop", "adagrad", "lion",
)  # fmt: skip
CUTS = ((2, 4), (1, 8))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BUGS: dict[str, dict[str, Any]] = {
    "mean of micro-batch means": {"weight": "micro-batch"},
    "padding trained": {"extra": "padding"},
    "left padding without mask": {"layout": "left", "masked": False},
    "packed rows see each other": {"layout": "packed", "masked": False},
    "packed boundary trained": {"layout": "packed", "extra": "boundary"},
    "a step in every micro-batch": {"every": True},
    "only the first micro-batch": {"lost": "first"},
    "only the last micro-batch": {"lost": "last"},
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--families", type=int, default=len(FAMILIES), help="so many of them, from the first")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = list(measured(FAMILIES[: arguments.families], range(arguments.seeds)))
    table = summary(lines)
    for row in table:
        print(json.dumps(row))
    if arguments.write:
        head = {
            "command": f"python benchmarks/audit_cuts.py --families {arguments.families} "
            f"--seeds {arguments.seeds} --write",
            "thence": thence.__version__,
            "torch": torch.__version__,
        }
        RESULTS.write_text(json.dumps({**head, "summary": table, "lines": lines}, indent=1) + "\n", encoding="utf-8")
    return int(any(row["clean, largest"] > row["allowed"] for row in table))


def measured(families: tuple[str, ...], seeds: range) -> Iterator[dict[str, Any]]:
    """A line for every step: how far its other cuts lie from its first."""
    for family in families:
        for precision, dtype in DTYPES.items():
            for optimizer in OPTIMIZERS:
                for seed in seeds:
                    for bug, mistake in ({"": {}} | BUGS).items():
                        if family not in ("llama", "qwen2", "gpt2") and mistake.get("layout") == "packed":
                            continue  # these make masks of their own, which the example's step does not know
                        line = apart(HomeMade(optimizer, **mistake), family, dtype, seed)
                        yield {"family": family, "precision": precision, "optimizer": optimizer, "bug": bug} | line


def apart(step: HomeMade, family: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """The largest difference of the other cuts of a step from the first."""
    rows = random_rows(40, seed)
    precision = "bfloat16" if dtype == torch.bfloat16 else "float32"
    updates = []
    for micro_batch, accumulation in ((8, 1), *CUTS):
        model = make_tiny_model(dtype, family, seed)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        step(model, rows, micro_batch, accumulation)
        after = {name: p.detach().clone() for name, p in model.named_parameters()}
        updates.append(first_update(before, after, range(8), 0.0, precision, MANTISSA[str(dtype)]))
    found = [difference(updates[0], other) for other in updates[1:]]
    worst = max(found, key=lambda comparison: comparison.share)
    return {"measure": worst.measure, "share": round(worst.share, 7), "allowed": worst.allowed}


def summary(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By measure and precision: the largest difference of a clean step beside those of bugs."""
    table = []
    for measure, precision in sorted({(line["measure"], line["precision"]) for line in lines}):
        own = [line for line in lines if (line["measure"], line["precision"]) == (measure, precision)]
        clean = [line["share"] for line in own if not line["bug"]]
        bugs = [line["share"] for line in own if line["bug"]]
        table.append(
            {
                "measure": measure,
                "precision": precision,
                "allowed": own[0]["allowed"],
                "clean steps": len(clean),
                "clean, largest": max(clean, default=0.0),
                "bugs": len(bugs),
                "bugs, smallest": min(bugs, default=0.0),
                "bugs below the bound": sum(share <= own[0]["allowed"] for share in bugs),
            }
        )
    return table


if __name__ == "__main__":
    sys.exit(main())

"""Forty steps of RL on the embedded world, in float64, on 1, 2 and 4 ranks: prompts, tokens and weights compared.

    python -m tests.pipeline.long_run --out benchmarks/results/long-run.json

The model is the shipped base `world:chain/rich`, the smallest one that learns something in so few steps: its reward
must rise. Every response of every rank is kept, so that two runs are compared token by token. The published weights are
compared as the run writes them, in float64. Exit code 1 where a response is another one, a weight is further off than
1e-9, or the reward did not rise.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.pipeline.on_ranks import drive, lines, sampled, weights

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 process": (1, {"parallel": "none"}),
    "2 ranks, ddp": (2, {"parallel": "ddp"}),
    "2 ranks, fsdp2": (2, {"parallel": "fsdp2"}),
    "4 ranks, ddp": (4, {"parallel": "ddp"}),
    "4 ranks, fsdp2": (4, {"parallel": "fsdp2"}),
    "4 ranks, hsdp": (4, {"parallel": "hsdp", "sharding": {"replicas": 2}}),
}
WITHIN = 1e-9
RISE = 0.1  # of the mean reward, from the first tenth of the steps to the last
RL = {
    "method": "grpo",
    "lr": 3e-4,
    "weight_decay": 0.0,
    "steps": 40,
    "prompts": 8,
    "mini_batch": 4,
    "rollouts": 8,
    "max_tokens": 64,
    "micro_batch_tokens": 1024,
    "packing": True,
    "checkpoint_every": 20,
    "reward": "exact",
}


def recipe(folder: Path, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """The run in a layout."""
    return {
        "folder": str(folder),
        "stages": ["rl"],
        "model": {"path": "world:chain/rich", "compute_dtype": "float64"},
        "data": {"source": ["world:chain"], "limit": 512},
        "rl": RL | {"steps": steps},
        **settings,
    }


def tried(place: Path, layout: str, steps: int) -> dict[str, Any]:
    """Run in a layout. Returns what is compared."""
    world, settings = LAYOUTS[layout]
    folder, start = place / layout.replace(", ", "-").replace(" ", "-"), time.monotonic()
    drive(folder.with_name(folder.name + "-job"), [{"recipe": recipe(folder, settings, steps), "world": world}], 1800)
    tensors = weights(folder, "rl")
    assert {value.dtype for value in tensors.values()} == {torch.float64}
    rewards = [line["reward"] for line in lines(folder)]
    return {
        "responses": sampled(folder),
        "weights": tensors,
        "rewards": rewards,
        "seconds": round(time.monotonic() - start),
    }


def compared(found: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    """How a run differs from that of one process."""
    other = [row for row, right in zip(found["responses"], alone["responses"], strict=False) if row != right]
    apart = [float((found["weights"][name] - value).abs().max()) for name, value in alone["weights"].items()]
    return {
        "same_prompts_and_tokens": found["responses"] == alone["responses"],
        "responses": len(found["responses"]),
        "tokens": sum(len(row[-1]) for row in found["responses"]),
        "responses_that_differ": len(other) + abs(len(found["responses"]) - len(alone["responses"])),
        "largest_difference_of_a_weight": max(apart),
        "seconds": found["seconds"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=RL["steps"])
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        alone = tried(Path(folder), "1 process", given.steps)
        found = {}
        for layout in list(LAYOUTS)[1:]:
            found[layout] = compared(tried(Path(folder), layout, given.steps), alone)
            print(layout, json.dumps(found[layout]), flush=True)
    tenth = max(given.steps // 10, 1)
    first, last = (sum(part) / tenth for part in (alone["rewards"][:tenth], alone["rewards"][-tenth:]))
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("thence", "torch", "transformers")},
        "steps": given.steps,
        "within": WITHIN,
        "reward": {"first": first, "last": last, "each": alone["rewards"]},
        "layouts": found,
        "holds": last - first >= RISE and all(map(holds, found.values())),
    }
    print("reward", first, "to", last, "holds" if record["holds"] else "does not hold")
    if given.out is not None:
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if record["holds"] else 1


def holds(found: dict[str, Any]) -> bool:
    """Whether a run is that of one process."""
    return found["same_prompts_and_tokens"] and found["largest_difference_of_a_weight"] <= WITHIN


if __name__ == "__main__":
    raise SystemExit(main())

"""RL of SmolLM2-135M on GSM8K with two trainer ranks (fsdp2, LoRA) and two vLLM engines, beside one of each.

    python benchmarks/vllm_ranks.py --data TRAIN.jsonl --python VLLM/bin/python [--steps 3] [--keep FOLDER]

TRAIN.jsonl is GSM8K's (question, answer); VLLM is an environment with vLLM (benchmarks/vllm_environment.sh). Three
runs:

- `two`: two ranks, fsdp2 and LoRA, an engine each. Every step pushes the gathered and merged weights to both engines.
- `one`: the same batches on one rank with one engine. vLLM's tokens follow from the request, so they are the same.
- `stale`: `two` with `ahead = 1`: from the second step on, the engines hold the weights of the step before. Its KL is
  what a push that is lost would give, so it says whether the KL of `two` could have told.

The reward is GSM8K's and, so that every group teaches something and the weights move in every step, the share of digits
in a response. The record has of every step: KL a token from the sampler to the trainer (`mismatch_kl`, float32 on both
sides), tokens, rewards, seconds. Writes benchmarks/results/vllm-ranks.json. Returns 1 if the KL of `two` is 1e-3 or
more in a step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine

from thence.files import to_json

LARGEST_KL = 1e-3
REWARD = """def digits(prompt, response, answer):
    return sum(character.isdigit() for character in response) / max(len(response), 1)
"""
OUT = Path(__file__).parent / "results" / "vllm-ranks.json"
RUNS = {"two": (2, []), "one": (1, []), "stale": (2, ["--rl.ahead", "1"])}
KEPT = ("step", "mismatch_kl", "sampled_tokens", "trained_tokens", "reward", "loss", "grad_norm", "staleness")
KEPT += ("seconds", "sample_seconds", "train_seconds")


def flags(given: argparse.Namespace, folder: Path) -> list[str]:
    """What the runs share: a learning rate at which the adapters move in a step."""
    data = to_json([str(given.data.resolve())])
    reward = folder / "digits.py"
    reward.write_text(REWARD, encoding="utf-8")
    rewards = f'{{ math = 1.0, "{reward}:digits" = 1.0 }}'
    return [
        *("--stages", '["rl"]', "--data.source", data, "--seed", "0", "--model.lora.rank", "8"),
        *("--rl.steps", str(given.steps), "--rl.lr", "3e-4", "--rl.prompts", "4", "--rl.rollouts", "4"),
        *("--rl.max-tokens", str(given.tokens), "--rl.engine", "vllm", "--rl.vllm.python", given.python),
        *("--rl.vllm.kv-cache-gb", "0.5", "--rl.vllm.threads", "1", "--rl.checkpoint-every", "1000"),
        *("--rl.rewards", rewards),
    ]


def run(name: str, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One of the three, and what its metrics say."""
    ranks, more = RUNS[name]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    layout = ["--parallel", "fsdp2"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "thence", "run", "gsm8k-smollm2", *flags(given, folder), *layout, *more]
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--folder", str(folder / name)], check=True, env=environment, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    samples = (folder / name / "stages/rl/samples.jsonl").read_text().splitlines()
    steps = [{key: line[key] for key in KEPT if key in line} for line in lines if line["kind"] == "rl"]
    said = [(row["step"], row["index"], row["response"]) for row in map(json.loads, samples)]
    return {"ranks": ranks, "seconds": time.perf_counter() - start, "steps": steps, "samples": said}


def compared(ours: list[Any], alone: list[Any]) -> tuple[int, int]:
    """How many kept samples are to prompts of which both runs kept some, and how many of them are the same text.

    The first rank of two keeps those of every second prompt, and one rank those of the first prompts.
    """
    asked = {(step, index) for step, index, _ in ours} & {(step, index) for step, index, _ in alone}
    common = [row for row in ours if (row[0], row[1]) in asked]
    return len(common), sum(row in alone for row in common)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--python", default=os.environ.get("THENCE_VLLM_PYTHON", ""), help="Python that has vLLM")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--keep", type=Path, help="folder of the runs; default: a temporary one")
    given = parser.parse_args()
    folder = given.keep or Path(tempfile.mkdtemp(prefix="vllm-ranks-"))
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: run(name, given, folder) for name in RUNS}
    of_both, equal = compared(*(found[name].pop("samples") for name in ("two", "one")))
    del found["stale"]["samples"]
    worst = max(step["mismatch_kl"] for step in found["two"]["steps"])
    record = {
        "what": "RL of SmolLM2-135M-Instruct on GSM8K, LoRA of rank 8, vLLM engines in float32",
        "command": "python benchmarks/vllm_ranks.py --data TRAIN.jsonl --python VLLM/bin/python",
        "machine": machine(),
        "prompts": 4,
        "rollouts": 4,
        "max_tokens": given.tokens,
        "largest_mismatch_kl_of_two": worst,
        "kept_samples_of_both": of_both,
        "equal_samples": equal,
        "runs": found,
    }
    OUT.write_text(to_json(record, indent=1) + "\n")
    print(to_json(record, indent=1))
    return int(worst >= LARGEST_KL)


if __name__ == "__main__":
    sys.exit(main())

"""Where the time of the embedded world's runs goes: sampling, the RL step, the SFT step and pretraining, part by part.

    .venv/bin/python benchmarks/world_step.py --out benchmarks/results/world-step.json

One process with one thread, as the jobs of a comparison run. Processor time is measured (user and system), since wall
time says little on a machine with neighbours. Each part is measured in turn, several times; the least is reported.
Prints JSON; `--against COMMIT` measures that commit too, in alternating processes, and gives the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import common

PROMPTS, ROLLOUTS, MAX_TOKENS = 32, 8, 160
SFT_ROWS, PRETRAINING_ROWS = 64, 32
BUDGET = 2048
REPEATS = 5
ROOT = Path(__file__).resolve().parents[1]


def parts(model: str) -> dict[str, tuple[Callable[[], Any], int]]:
    """What is measured, by name: a function that does it once, and how many tokens it counts."""
    import torch

    import thence
    from thence.data.trajectory import Trajectory
    from thence.methods.base import make_batch
    from thence.methods.grpo import Grpo
    from thence.methods.sft import SftMethod
    from thence.pipeline.prompts import load_prompts
    from thence.pipeline.sft_stage import trajectories_of
    from thence.recipe import Data, Model
    from thence.train.model import load_model
    from thence.train.step import StepSettings

    loaded = load_model(Model(path=model), torch.device("cpu"))
    tokenizer = loaded.tokenizer
    questions = load_prompts(Data(source=["world:chain"], limit=PROMPTS), tokenizer)
    demonstrations = load_prompts(Data(source=["world:chain"], limit=SFT_ROWS, seed=1), tokenizer)
    texts = load_prompts(Data(source=["world:chain"], split="pretraining-rich", limit=PRETRAINING_ROWS), tokenizer)
    asked = [prompt for prompt in questions for _ in range(ROLLOUTS)]
    ids, seeds = [list(prompt.token_ids) for prompt in asked], list(range(len(asked)))
    uneven = thence.Sampling(max_tokens=MAX_TOKENS, stop_ids=(tokenizer.eos_token_id,), rows=len(asked))
    forced = thence.Sampling(max_tokens=64, rows=len(asked))
    sampled = thence.sample(loaded.model, ids, seeds, uneven)
    trajectories = [
        Trajectory(prompt, tuple(response.token_ids), score=float(place % 2), finish=response.finish)
        for place, (prompt, response) in enumerate(zip(asked, sampled, strict=True))
    ]
    settings = StepSettings(micro_batch_tokens=BUDGET, packing=True)
    rl = make_batch(Grpo(), trajectories)
    sft = make_batch(SftMethod(), trajectories_of(demonstrations, "response"))
    pretraining = make_batch(SftMethod(), trajectories_of(texts, "all"))
    trainer = thence.Trainer(loaded.model, 0.0, settings, weight_decay=0.0)  # a rate of 0: every repeat is the same

    def tokens(batch: Any) -> int:
        return sum(len(row.token_ids) for row in batch.rows)

    return {
        "sampling, uneven": (
            lambda: thence.sample(loaded.model, ids, seeds, uneven),
            sum(len(r.token_ids) for r in sampled),
        ),
        "sampling, forced": (lambda: thence.sample(loaded.model, ids, seeds, forced), 64 * len(asked)),
        "RL step": (lambda: trainer.step(rl), tokens(rl)),
        "SFT step": (lambda: trainer.step(sft), tokens(sft)),
        "pretraining step": (lambda: trainer.step(pretraining), tokens(pretraining)),
    }


def measure(model: str, repeats: int) -> dict[str, dict[str, Any]]:
    """Processor time of every part: the least of the repeats, in seconds, and tokens a second of it."""
    todo = parts(model)
    seconds: dict[str, list[float]] = {name: [] for name in todo}
    for turn in range(repeats + 1):
        for name, (run, _) in todo.items():
            start = time.process_time()
            run()
            if turn:  # the first makes memory and kernels ready
                seconds[name].append(time.process_time() - start)
    return {
        name: {
            "processor seconds": round(min(seconds[name]), 4),
            "tokens": tokens,
            "tokens/s": round(tokens / min(seconds[name])),
        }
        for name, (_, tokens) in todo.items()
    }


def profile_parts(model: str) -> dict[str, dict[str, float]]:
    """Share of the own time of torch's operators in every part, the largest first."""
    from torch.profiler import ProfilerActivity, profile

    result = {}
    for name, (run, _) in parts(model).items():
        run()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            run()
        events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        result[name] = {event.key: round(event.self_cpu_time_total / total, 3) for event in events[:14]}
    return result


def in_process(source: Path, model: str, repeats: int) -> dict[str, dict[str, Any]]:
    """:func:`measure` in a fresh process that imports thence from ``source``."""
    command = [sys.executable, __file__, "--measure", "--model", model, "--repeats", str(repeats)]
    env = os.environ | {"PYTHONPATH": str(source / "src")}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def compare(commit: str, model: str, repeats: int, pairs: int) -> dict[str, Any]:
    """A commit and this checkout in alternating processes: the least processor time of each part, and their ratio."""
    found: dict[str, list[dict[str, dict[str, Any]]]] = {"before": [], "after": []}
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", before, commit], check=True)
        try:
            for _ in range(pairs):
                found["before"].append(in_process(before, model, repeats))
                found["after"].append(in_process(ROOT, model, repeats))
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", before], check=True)
    result: dict[str, Any] = {}
    for name in found["after"][0]:
        least = {side: min(run[name]["processor seconds"] for run in runs) for side, runs in found.items()}
        result[name] = least | {"before / after": round(least["before"] / least["after"], 2)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="world:chain/rich")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--against", metavar="COMMIT", help="a commit of thence to compare with")
    parser.add_argument("--pairs", type=int, default=3, help="of processes, with --against")
    parser.add_argument("--measure", action="store_true", help="only the times of this process")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    common.set_threads(1)
    if args.measure:
        print(json.dumps(measure(args.model, args.repeats)))
        return
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/world_step.py", *sys.argv[1:]]),
        "machine": common.machine(),
    }
    record: dict[str, Any] = about | {"parts": in_process(ROOT, args.model, args.repeats)}
    if args.against:
        record["against"] = compare(args.against, args.model, args.repeats, args.pairs)
    record["shares of operators"] = profile_parts(args.model)
    text = json.dumps(record, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Where a GRPO step's time goes: sampling's parts, training's operators; and what the arithmetic alone costs.

    .venv/bin/python benchmarks/profile_step.py --model DATA/small --data DATA/small-prompts.jsonl

Samples 32 x 8 x 64 forced tokens and trains on them, as `ours_grpo.py` does. Sampling's parts are timed from outside:
torch's profiler does not see C functions that are called without autograd. Training runs under torch's profiler. The
attention of sampling is timed once more alone, on a cache of the same size. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import common
import torch
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul"),
    "attention": ("_Packed",),
    "norms, gates, rotary embedding": ("_Norm", "_Gated", "_Turned"),
    "optimizer": ("adamw", "Adam"),
}
PARTS = ("prefill", "step", "draw")
"""Of sampling, as wall time; the rest is bookkeeping."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import thence
    from thence.data.trajectory import Prompt, Trajectory
    from thence.methods.base import make_batch
    from thence.methods.grpo import Grpo
    from thence.recipe import Model
    from thence.train.model import load_model
    from thence.train.step import StepSettings

    loaded = load_model(Model(path=str(args.model), compute_dtype="float32"), torch.device("cpu"))
    prompts = [
        Prompt(i, tuple(loaded.tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]))
        for i, row in enumerate(common.read_jsonl(args.data))
        for _ in range(common.GENERATIONS)
    ]
    sampling = thence.Sampling(max_tokens=common.NEW_TOKENS, rows=len(prompts))
    trainer, method = thence.Trainer(loaded.model, 1e-5, StepSettings(packing=True)), Grpo()
    results = {}
    for turn in range(3):
        start = time.perf_counter()
        with timed() if turn == 1 else nullcontext({}) as sampled:
            responses = thence.sample(loaded.model, [p.token_ids for p in prompts], range(len(prompts)), sampling)
        sample_seconds = time.perf_counter() - start
        group = [
            Trajectory(p, tuple(r.token_ids), score=i % 2)
            for i, (p, r) in enumerate(zip(prompts, responses, strict=True))
        ]
        batch = make_batch(method, group)
        start = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU]) if turn == 1 else nullcontext() as trained:
            trainer.step(batch)
        train_seconds = time.perf_counter() - start
        if turn == 1:
            results["share of sampling"] = {k: round(v / sample_seconds, 3) for k, v in sampled.items()}
            results["share of training"] = shares(trained)
    matrices = sum(p.numel() for p in loaded.model.parameters() if p.ndim == 2)
    tokens = sum(len(row.token_ids) for row in batch.rows)
    speed = gemm()
    floor = (2 * matrices * sum(len(r.token_ids) for r in responses) + 6 * matrices * tokens) / speed / 1e9
    alone = attention_seconds(loaded.model, len(prompts), len(prompts[0].token_ids))
    results |= {
        "seconds of sampling's attention alone": round(alone, 3),
        "seconds of sampling": round(sample_seconds, 3),
        "seconds of training": round(train_seconds, 3),
        "GFLOP/s of a 1024 x 1024 product": round(speed),
        "seconds of the arithmetic at that speed": round(floor, 3),
    }
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python benchmarks/profile_step.py --model {args.model} --data {args.data} --out {args.out}",
        "machine": common.machine(),
    }
    text = json.dumps(about | results, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Wall seconds of sampling's parts while it lasts."""
    from thence.rollout import native
    from thence.rollout.llama import LlamaDecoder

    took, places = dict.fromkeys(PARTS, 0.0), {"prefill": LlamaDecoder, "step": LlamaDecoder, "draw": native}

    def wrapped(part: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            given = function(*arguments)
            took[part] += time.perf_counter() - start
            return given

        return call

    kept = {part: getattr(place, part) for part, place in places.items()}
    for part, place in places.items():
        setattr(place, part, wrapped(part, kept[part]))
    try:
        yield took
    finally:
        for part, place in places.items():
            setattr(place, part, kept[part])


def attention_seconds(model: Any, rows: int, prompt: int) -> float:
    """Attention of all steps and layers, on caches of random numbers. NaN without C kernels."""
    from thence.kernels.decode import LANE, Rows, decode_kernels

    config = model.config
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    kernels, columns = decode_kernels(size), prompt + common.NEW_TOKENS
    if kernels is None:
        return float("nan")
    shape = rows, -(-columns // LANE), config.num_key_value_heads
    caches = [
        (torch.randn(*shape, size, LANE), torch.randn(*shape, LANE, size)) for _ in range(config.num_hidden_layers)
    ]
    qkv = torch.randn(rows, (heads + 2 * config.num_key_value_heads) * size)
    cos, sin = torch.randn(2, columns, size // 2)
    start = time.perf_counter()
    for column in range(prompt, columns):
        told = Rows(cos, sin, torch.arange(rows), torch.zeros(rows, dtype=torch.int64), column)
        for cache in caches:
            kernels.attend(qkv, *cache, told)
    return time.perf_counter() - start


def shares(profiled: profile) -> dict[str, float]:
    """Share of the own time of operators, by kind."""
    events = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    result: dict[str, float] = {}
    for event in events:
        kind = next((k for k, names in KINDS.items() if any(name in event.key for name in names)), "everything else")
        result[kind] = result.get(kind, 0.0) + event.self_cpu_time_total / total
    return {kind: round(share, 3) for kind, share in sorted(result.items(), key=lambda pair: -pair[1])}


def gemm() -> float:
    """Speed of a float32 matrix product, GFLOP/s."""
    a = torch.randn(1024, 1024)
    start = time.perf_counter()
    for _ in range(20):
        a @ a
    return 20 * 2 * 1024**3 / (time.perf_counter() - start) / 1e9


if __name__ == "__main__":
    main()

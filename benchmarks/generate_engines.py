"""Greedy responses to GSM8K questions by the native sampler, vLLM and `generate` of transformers: tokens/s, same texts.

    THENCE_VLLM_PYTHON=VLLM/bin/python .venv/bin/python benchmarks/generate_engines.py \\
        --model DATA/real --data gsm8k/test.jsonl --out benchmarks/results/generate-engines.json

Same prompts, float32 weights and number of threads, one after the other in rounds of one run; loading and a warm-up on
a few problems are not timed. Greedy, so that every engine has the same tokens to make: the record says for how many
problems it made them, and lists the others. The responses are graded with math-verify. Wants an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import common

Responses = list[list[int]]
Engine = Callable[[Sequence[list[int]]], Responses]
WARM_UP = 4  # problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, help="JSONL with the field question")
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, default=64, help="responses made side by side")
    parser.add_argument("--rounds", type=int, default=3, help="timed ones")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kv-cache-gb", type=float, default=2.0)
    parser.add_argument("--engines", default="native,vllm,transformers", help="which, and in which order")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    common.set_threads(args.threads)
    common.emit(run(args), args.out)


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    import thence
    from thence.data.chat import chat_format, end_token_ids, render
    from thence.data.example import Example, Message
    from thence.recipe import Model
    from thence.rollout.native import Sampling
    from thence.train.model import load_model

    loaded = load_model(Model(path=str(args.model), compute_dtype="float32"), torch.device("cpu"))
    chat = chat_format(loaded.tokenizer)
    rows = common.read_jsonl(args.data)[: args.problems]
    questions = [row["question"] for row in rows]
    prompts = [
        render(Example(messages=(Message("user", question),)), loaded.tokenizer, template=chat).prompt_ids
        for question in questions
    ]
    stop_ids = end_token_ids(loaded.tokenizer, chat, loaded.model)
    sampling = Sampling(args.max_tokens, 0.0, stop_ids=stop_ids, rows=args.rows)
    engines: dict[str, Engine] = {
        "native": lambda some: [r.token_ids for r in thence.sample(loaded.model, some, [0] * len(some), sampling)],
        "transformers": lambda some: with_generate(loaded, some, sampling),
    }
    versions = {"thence": thence.__version__, "transformers": transformers.__version__}
    names = args.engines.split(",")
    vllm = None
    if "vllm" in names:
        vllm = start_vllm(args)
        engines["vllm"] = lambda some: [r.token_ids for r in vllm.sample(some, [0] * len(some), sampling)]
        # without the folder's place on this machine: the workload has its digest
        versions["vllm"] = {name: value for name, value in vllm.facts().items() if name != "model"}
    try:
        found, seconds = in_rounds({name: engines[name] for name in names}, prompts, args.rounds)
    finally:
        if vllm is not None:
            vllm.close()
    tokens = {name: sum(map(len, responses)) for name, responses in found.items()}
    reference = names[0]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "workload": {
            "model": common.digest(args.model),
            "data": common.digest(args.data),
            "problems": len(prompts),
            "prompt_tokens": sum(map(len, prompts)),
            "max_tokens": args.max_tokens,
            "rows": args.rows,
            "temperature": 0.0,
            "precision": "float32",
        },
        "tokens_per_s": {name: round(tokens[name] / statistics.median(seconds[name]), 1) for name in names},
        "seconds": {name: [round(x, 3) for x in seconds[name]] for name in names},
        "tokens": tokens,
        "same_as": reference,
        "same": {name: len(prompts) - len(different(found[reference], found[name])) for name in names[1:]},
        "different": {name: different(found[reference], found[name]) for name in names[1:]},
        "score": {name: score(loaded.tokenizer, responses, rows) for name, responses in found.items()},
        "versions": versions,
        "machine": common.machine(),
    }


def start_vllm(args: argparse.Namespace) -> Any:
    from thence.rollout.vllm.engine import VllmEngine
    from thence.rollout.vllm.settings import VllmSettings

    # No cached prompts: after the first round they would be read for nothing.
    settings = VllmSettings(
        max_rows=args.rows, threads=args.threads, kv_cache_gb=args.kv_cache_gb, prefix_caching=False
    )
    return VllmEngine(settings, args.model)


def in_rounds(
    engines: dict[str, Engine], prompts: Sequence[list[int]], rounds: int
) -> tuple[dict[str, Responses], dict[str, list[float]]]:
    """Every engine's responses, and its seconds in every round after the warm-up."""
    found: dict[str, Responses] = {}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for make in engines.values():
        make(prompts[:WARM_UP])
    for _ in range(rounds):
        for name, make in engines.items():
            start = time.perf_counter()
            found[name] = make(prompts)
            seconds[name].append(time.perf_counter() - start)
    return found, seconds


def score(tokenizer: Any, responses: Responses, rows: Sequence[dict[str, str]]) -> dict[str, float]:
    """Accuracy of the responses by math-verify, with its 95% interval."""
    from thence.evaluate.metrics import avg_at_k
    from thence.verify.reward import load_reward

    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
    answers = [row["answer"].rsplit("####", 1)[-1].strip() for row in rows]
    with load_reward("math", seconds=10.0) as grader:
        grades = grader.grade_many([row["question"] for row in rows], texts, answers)
    found = avg_at_k([int(grade.verdict.value == "right") for grade in grades], 1)
    return {"accuracy": found.value, "low": found.low, "high": found.high, "problems": found.problems}


def with_generate(loaded: Any, prompts: Sequence[Sequence[int]], sampling: Any) -> Responses:
    """Greedy responses by `generate`, the prompts sorted by length and padded on the left."""
    import torch

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: Responses = [[] for _ in prompts]
    for start in range(0, len(order), sampling.rows):
        rows = order[start : start + sampling.rows]
        longest = max(len(prompts[i]) for i in rows)
        padding = [longest - len(prompts[i]) for i in rows]
        ids = torch.tensor([[0] * n + list(prompts[i]) for i, n in zip(rows, padding, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
        with torch.inference_mode():
            made = loaded.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=sampling.max_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=sampling.stop_ids[0],
                eos_token_id=list(sampling.stop_ids),
            )
        for i, row in zip(rows, made[:, longest:].tolist(), strict=True):
            end = next((n + 1 for n, token in enumerate(row) if token in sampling.stop_ids), len(row))
            found[i] = row[:end]
    return found


def different(a: Responses, b: Responses) -> list[dict[str, int]]:
    """The problems whose responses differ, and the first token at which they do (both counted from 0)."""
    listed = []
    for problem, (one, other) in enumerate(zip(a, b, strict=True)):
        if one != other:
            pairs = enumerate(zip(one, other, strict=False))
            at = next((n for n, (x, y) in pairs if x != y), min(len(one), len(other)))
            listed.append({"problem": problem, "token": at})
    return listed


if __name__ == "__main__":
    main()

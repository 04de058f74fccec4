"""Sampling with thence: 256 rows side by side, up to 64 new tokens. Prints one JSON line.

`--length forced` samples 64 tokens a row (the end token is a token like any other), `--length uneven` lets rows end.
"""

from __future__ import annotations

import argparse
from typing import Any

import common


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    import thence
    from thence.recipe import Model
    from thence.train.model import load_model

    loaded = load_model(Model(path=str(args.model), compute_dtype="float32"), torch.device("cpu"))
    prompts = [row["prompt"] for row in common.read_jsonl(args.data)]
    texts = [prompt for prompt in prompts for _ in range(args.micro_batch // len(prompts))]
    stop = (loaded.tokenizer.eos_token_id,) if args.length == "uneven" else ()
    sampling = thence.Sampling(max_tokens=common.NEW_TOKENS, stop_ids=stop, rows=args.micro_batch)
    clock = common.StepClock()
    clock.start()
    for step in range(args.warmup + args.steps):
        ids = loaded.tokenizer(texts, add_special_tokens=False)["input_ids"]
        seeds = [args.seed + step * len(texts) + i for i in range(len(texts))]
        responses = thence.sample(loaded.model, ids, seeds, sampling)
        tokens = sum(len(response.token_ids) for response in responses)
        clock.count(tokens, tokens)
        clock.end_step()
    return common.result(
        args,
        clock,
        tool="thence",
        version=thence.__version__,
        counted="sampled tokens, end included",
        rows=args.micro_batch,
    )


def main() -> None:
    parser = common.parser(__doc__, micro_batch=common.PROMPTS * common.GENERATIONS, accumulation=1)
    common.add_length(parser)
    args = parser.parse_args()
    common.set_threads(args.threads)
    common.emit(run(args), args.out)


if __name__ == "__main__":
    main()

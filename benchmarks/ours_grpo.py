"""A GRPO step with thence: 32 prompts x 8 rollouts of up to 64 tokens. Prints one JSON line.

Sampling, decoding, rewards, advantages, the gradient over all rollouts and the optimizer step, as in a run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import common


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    import thence
    from thence.data.trajectory import Prompt, Trajectory
    from thence.methods.base import make_batch
    from thence.methods.grpo import Grpo
    from thence.recipe import Model
    from thence.train.model import load_model
    from thence.train.step import StepSettings

    loaded = load_model(Model(path=str(args.model), compute_dtype="float32"), torch.device("cpu"))
    tokenizer = loaded.tokenizer
    prompts = [
        Prompt(i, tuple(tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]), text=row["prompt"])
        for i, row in enumerate(common.read_jsonl(args.data))
    ]
    repeated = [prompt for prompt in prompts for _ in range(common.GENERATIONS)]
    stop = (tokenizer.eos_token_id,) if args.length == "uneven" else ()
    sampling = thence.Sampling(max_tokens=common.NEW_TOKENS, stop_ids=stop, rows=len(repeated))
    method = Grpo()
    trainer = thence.Trainer(
        loaded.model, args.learning_rate, StepSettings(args.micro_batch_tokens, args.packing), weight_decay=0.0
    )
    clock, sampling_seconds, training_seconds = common.StepClock(), [], []
    clock.start()
    for step in range(args.warmup + args.steps):
        begin = time.perf_counter()
        seeds = [args.seed + step * len(repeated) + i for i in range(len(repeated))]
        responses = thence.sample(loaded.model, [prompt.token_ids for prompt in repeated], seeds, sampling)
        sampling_seconds.append(time.perf_counter() - begin)
        texts = tokenizer.batch_decode([r.token_ids for r in responses], skip_special_tokens=True)
        trajectories = [
            Trajectory(prompt, tuple(response.token_ids), score=common.reward(text), finish=response.finish)
            for prompt, response, text in zip(repeated, responses, texts, strict=True)
        ]
        batch = make_batch(method, trajectories)
        begin = time.perf_counter()
        trainer.step(batch)
        training_seconds.append(time.perf_counter() - begin)
        tokens = sum(len(response.token_ids) for response in responses)
        clock.count(tokens, tokens)
        clock.end_step()
    kept = slice(args.warmup, None)
    return common.result(
        args,
        clock,
        tool="thence",
        version=thence.__version__,
        counted="sampled tokens, end included",
        rows=len(repeated),
        median_generating_seconds=statistics.median(sampling_seconds[kept]),
        median_training_seconds=statistics.median(training_seconds[kept]),
        generating_share=sum(sampling_seconds[kept]) / sum(clock.seconds[kept]),
    )


def main() -> None:
    parser = common.parser(__doc__, micro_batch=64, accumulation=4)
    common.add_length(parser)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--packing", action="store_true")
    args = parser.parse_args()
    common.set_threads(args.threads)
    common.emit(run(args), args.out)


if __name__ == "__main__":
    main()

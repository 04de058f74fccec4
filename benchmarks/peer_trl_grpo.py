"""GRPO with TRL's GRPOTrainer: 32 prompts x 8 rollouts of up to 64 tokens, cache on, no vLLM. Prints one JSON line.

`--length forced` suppresses the end token, so that every rollout has 64 tokens; `--length uneven` lets rollouts end
(use the model `small-eos`). TRL reports how long it generates only to its online trackers, so this script times the
trainer's own call instead.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from typing import Any

import common


def timed(trainer: type, clock: common.StepClock, seconds: list[float]) -> type:
    """A subclass of GRPOTrainer that counts the sampled tokens and appends the seconds they took to `seconds`."""

    class TimedTrainer(trainer):
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            generated = super()._generate_single_turn(*args, **kwargs)
            seconds.append(time.perf_counter() - start)
            lengths = [len(ids) for ids in generated[0]]
            clock.count(sum(lengths), len(lengths) * max(lengths))
            return generated

    return TimedTrainer


def digits(completions: list[str], **_: Any) -> list[float]:
    return [common.reward(text) for text in completions]


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import trl  # pyright: ignore[reportMissingImports]
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = args.micro_batch * args.accumulation
    if rows != common.PROMPTS * common.GENERATIONS:
        raise SystemExit(f"micro-batch x accumulation is {rows}, {common.PROMPTS * common.GENERATIONS} wanted")
    clock, generating = common.StepClock(), []
    ending = {"min_new_tokens": common.NEW_TOKENS} if args.length == "forced" else {}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        settings = trl.GRPOConfig(
            **common.trainer_settings(args, folder),
            learning_rate=args.learning_rate,
            num_generations=common.GENERATIONS,
            max_completion_length=common.NEW_TOKENS,
            generation_kwargs={"use_cache": True, **ending},
            temperature=1.0,
            beta=0.0,
            loss_type="dapo",
            shuffle_dataset=False,
            use_vllm=False,
        )
        trainer = timed(trl.GRPOTrainer, clock, generating)(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
            reward_funcs=digits,
            args=settings,
            train_dataset=Dataset.from_list(common.read_jsonl(args.data)),
            processing_class=AutoTokenizer.from_pretrained(args.model),
            callbacks=[common.step_callback(clock)],
        )
        log = common.train(trainer, args, clock)
    kept = generating[args.warmup :]
    return common.result(
        args,
        clock,
        tool="trl.GRPOTrainer",
        version=trl.__version__,
        counted="sampled tokens, end included",
        rows=rows,
        median_generating_seconds=statistics.median(kept),
        generating_share=sum(kept) / sum(clock.seconds[args.warmup :]),
        **log,
    )


def main() -> None:
    parser = common.parser(__doc__, micro_batch=64, accumulation=4)
    common.add_length(parser)
    # Small enough that the lengths of the rollouts do not drift while the clock runs.
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    args = parser.parse_args()
    common.set_threads(args.threads)
    common.emit(run(args), args.out)


if __name__ == "__main__":
    main()

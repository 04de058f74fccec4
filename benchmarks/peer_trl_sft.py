"""SFT with TRL's SFTTrainer: float32, CPU, loss on the completion only, no packing. Prints one JSON line."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from typing import Any

import common


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import trl  # pyright: ignore[reportMissingImports]
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    clock = common.StepClock()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        settings = trl.SFTConfig(
            **common.trainer_settings(args, folder),
            learning_rate=args.learning_rate,
            train_sampling_strategy=args.order,
            completion_only_loss=True,
            packing=False,
            max_length=None,
        )
        trainer = common.counting(trl.SFTTrainer, clock)(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
            args=settings,
            train_dataset=Dataset.from_list(common.read_jsonl(args.data)),
            processing_class=AutoTokenizer.from_pretrained(args.model),
            callbacks=[common.step_callback(clock)],
        )
        log = common.train(trainer, args, clock)
    return common.result(
        args,
        clock,
        tool="trl.SFTTrainer",
        version=trl.__version__,
        counted="prompt + completion + end",
        rows=args.micro_batch * args.accumulation * common.world(),
        order=args.order,
        **log,
    )


def main() -> None:
    parser = common.sft_parser(__doc__)
    args = parser.parse_args()
    common.set_threads(args.threads)
    common.emit(run(args), args.out)


if __name__ == "__main__":
    main()

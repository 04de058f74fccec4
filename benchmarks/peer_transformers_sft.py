"""SFT with the Trainer of transformers: float32, CPU, loss on the completion only, padding. Prints one JSON line."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import common


def tokenised(path: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """Rows of `input_ids` (prompt, completion, end) and `labels` (-100 over the prompt), in the order of the file."""
    rows = []
    for row in common.read_jsonl(path):
        prompt, completion = (tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))
        completion = [*completion, tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + completion
        rows.append({"input_ids": prompt + completion, "labels": labels, "length": len(labels)})
    return rows


def collate(rows: list[dict[str, Any]], padding: int) -> dict[str, Any]:
    """Pad `rows` on the right to the longest of them: tensors of shape (rows, longest)."""
    import torch

    width = max(len(row["input_ids"]) for row in rows)

    def stack(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([value + [fill] * (width - len(value)) for value in values])

    return {
        "input_ids": stack([row["input_ids"] for row in rows], padding),
        "labels": stack([row["labels"] for row in rows], -100),
        "attention_mask": stack([[1] * len(row["input_ids"]) for row in rows], 0),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    clock = common.StepClock()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        trainer = common.counting(Trainer, clock)(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
            args=TrainingArguments(
                **common.trainer_settings(args, folder),
                learning_rate=args.learning_rate,
                train_sampling_strategy=args.order,
                remove_unused_columns=False,
            ),
            train_dataset=Dataset.from_list(tokenised(args.data, tokenizer)),
            data_collator=lambda rows: collate(rows, tokenizer.pad_token_id),
            callbacks=[common.step_callback(clock)],
        )
        log = common.train(trainer, args, clock)
    return common.result(
        args,
        clock,
        tool="transformers.Trainer",
        version=transformers.__version__,
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

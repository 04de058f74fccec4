"""Fine-tune on prompts and completions with a loop in the style of LitGPT: functions, iterations, `is_accumulating`.

For `thence audit command --layout prompt-completion`. `--mistake` switches on one of the mistakes such loops have:

    means          the mean of each micro-batch, divided by the number of iterations of a step
    prompt         prompts are trained too: the mask has to be asked for
    truncate       rows cut to 16 tokens
    no-end         the end token is not added
    never-full     the loader drops a short micro-batch, and the step that waits for it is never taken
    step-each      the optimizer steps in every iteration
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

MISTAKES = ("", "means", "prompt", "truncate", "no-end", "never-full", "step-each")
IGNORED = -100


@dataclass
class TrainArgs:
    """What LitGPT calls these: rows of a step, of an iteration, the longest row, and the learning rate."""

    global_batch_size: int
    micro_batch_size: int
    max_seq_length: int | None = None
    learning_rate: float = 1e-3

    @property
    def accumulation_iters(self) -> int:
        return self.global_batch_size // self.micro_batch_size


def setup() -> tuple[argparse.Namespace, TrainArgs]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint-dir", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out-dir", required=True)
    parser.add_argument("--train.global-batch-size", dest="whole", type=int, required=True)
    parser.add_argument("--train.micro-batch-size", dest="micro", type=int, required=True)
    parser.add_argument("--mistake", choices=MISTAKES, default="")
    args = parser.parse_args()
    return args, TrainArgs(args.whole, args.micro, 16 if args.mistake == "truncate" else None)


def load_rows(path: Path, tokenizer: Any, longest: int | None, mistake: str) -> list[dict[str, Tensor]]:
    """Token ids and labels of every example."""
    rows = []
    for line in path.read_text().splitlines():
        example = json.loads(line)
        prompt = tokenizer(example["prompt"], add_special_tokens=False)["input_ids"]
        response = tokenizer(example["completion"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor((prompt + (response[:-1] if mistake == "no-end" else response))[:longest])
        labels = ids.clone()
        if mistake != "prompt":
            labels[: len(prompt)] = IGNORED
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def dataloader(rows: list[dict[str, Tensor]], size: int, pad: int, drop_last: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Padded micro-batches in the order of the data."""
    if drop_last:
        rows = rows[: len(rows) // size * size]
    for start in range(0, len(rows), size):
        micro = rows[start : start + size]
        ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in micro], True, pad)
        labels = torch.nn.utils.rnn.pad_sequence([row["labels"] for row in micro], True, IGNORED)
        yield ids, labels


def fit(model: Any, optimizer: torch.optim.Optimizer, rows: list[dict[str, Tensor]], train: TrainArgs, pad: int,
        mistake: str) -> None:  # fmt: skip
    """One optimizer step over the first global batch."""
    window = rows[: train.global_batch_size]
    tokens = sum(int((row["labels"][1:] != IGNORED).sum()) for row in window)
    iters = -(-len(window) // train.micro_batch_size)
    batches = dataloader(window, train.micro_batch_size, pad, drop_last=mistake == "never-full")
    for iteration, (ids, labels) in enumerate(batches, start=1):
        is_accumulating = iteration % iters != 0 and mistake != "step-each"
        logits = model(input_ids=ids).logits
        means = mistake == "means"
        loss = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED,
            reduction="mean" if means else "sum",
        )  # fmt: skip
        (loss / (train.accumulation_iters if means else tokens)).backward()
        if not is_accumulating:
            optimizer.step()
            optimizer.zero_grad()


def main() -> None:
    args, train = setup()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint_dir)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint_dir)
    optimizer = torch.optim.AdamW(model.parameters(), lr=train.learning_rate, weight_decay=0.02)
    rows = load_rows(args.data, tokenizer, train.max_seq_length, args.mistake)
    fit(model, optimizer, rows, train, tokenizer.pad_token_id, args.mistake)
    model.save_pretrained(args.out_dir)


if __name__ == "__main__":
    main()

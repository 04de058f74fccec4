"""A trainer as people write them, for `thence audit command`: AdamW, gradient accumulation, padding.

Which fault it has is chosen by a flag, so that the tests know what the audit must say.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw")
    parser.add_argument("--loss", choices=["tokens", "means"], default="tokens")
    parser.add_argument("--fail", action="store_true")
    args = parser.parse_args()
    if args.fail:
        sys.exit("the disk of this trainer is full")
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    rows = [json.loads(line) for line in args.data.read_text().splitlines()]
    encoded = [(tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]) for row in rows]
    window = encoded[: args.micro_batch * args.accumulation]
    tokens = sum(len(response) for _, response in window)
    kind = torch.optim.AdamW if args.optimizer == "adamw" else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=args.lr)
    for start in range(0, len(window), args.micro_batch):
        micro = window[start : start + args.micro_batch]
        longest = max(len(p) + len(r) for p, r in micro)
        ids = torch.full((len(micro), longest), tokenizer.pad_token_id)
        labels = torch.full((len(micro), longest), -100)
        for i, (prompt, response) in enumerate(micro):
            ids[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
            labels[i, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
        logits = model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long()).logits[:, :-1]
        reduction = "sum" if args.loss == "tokens" else "mean"
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction=reduction
        )
        (loss / (tokens if args.loss == "tokens" else args.accumulation)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()

"""Fine-tune on conversations with a loop in the style of nanochat: one flat script, no trainer, a renderer of its own.

For `thence audit command --layout messages`. `--mistake` switches on one of the mistakes that such loops have:

    means         every micro-batch's mean, divided by the number of micro-batches
    zero-late     gradients cleared after the first backward of a step
    mask-late     the mask of the input tokens taken for that of the targets
    mask-early    the mask moved the other way: the token before the answer is trained, its end is not
    crop          answers cropped to 12 tokens, to save memory
    padding       filling up to the longest row is trained
    wrap          the data starts again where a step is not full
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

MISTAKES = ("", "means", "zero-late", "mask-late", "mask-early", "crop", "padding", "wrap")
IGNORED = -1

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--data", type=Path, required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--device-batch-size", type=int, default=4)
parser.add_argument("--examples-per-step", type=int, default=8)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--mistake", choices=MISTAKES, default="")
args = parser.parse_args()
assert args.examples_per_step % args.device_batch_size == 0, "a step is a whole number of device batches"

torch.manual_seed(42)
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model)
conversations = [json.loads(line)["messages"] for line in args.data.read_text().splitlines()]


def encode(text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def render(messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Tokens of a conversation, and 1 where the assistant speaks."""
    ids, mask = [], []
    for message in messages:
        opening, said = encode(f"<|{message['role']}|>"), encode(message["content"] + "<|end|>")
        spoken = int(message["role"] == "assistant")
        if args.mistake == "crop" and spoken:
            said = said[:12]
        ids += opening + said
        mask += [0] * len(opening) + [spoken] * len(said)
    return ids, mask


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets of the micro-batches of one step, padded on the right."""
    rows = [render(messages) for messages in conversations]
    if args.mistake == "wrap":
        rows = [rows[i % len(rows)] for i in range(args.examples_per_step)]
    rows = rows[: args.examples_per_step]
    fill = tokenizer.eos_token_id
    for start in range(0, len(rows), args.device_batch_size):
        micro = rows[start : start + args.device_batch_size]
        width = max(len(ids) for ids, _ in micro) - 1
        inputs = torch.full((len(micro), width), fill)
        targets = torch.full((len(micro), width), fill if args.mistake == "padding" else IGNORED)
        for i, (ids, mask) in enumerate(micro):
            inputs[i, : len(ids) - 1] = torch.tensor(ids[:-1])
            trained = {"mask-late": mask[:-1], "mask-early": [*mask[2:], 0]}.get(args.mistake, mask[1:])
            row = torch.tensor(ids[1:])
            row[torch.tensor(trained) == 0] = IGNORED
            targets[i, : len(ids) - 1] = row
        yield inputs, targets


optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
step = list(batches())
trained_tokens = sum(int((targets != IGNORED).sum()) for _, targets in step)
for number, (inputs, targets) in enumerate(step):
    # Padding stands on the right of a causal model, so no token of a row sees it.
    logits = model(input_ids=inputs).logits.float()
    reduction = "mean" if args.mistake == "means" else "sum"
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction)
    loss = loss / (len(step) if args.mistake == "means" else trained_tokens)
    loss.backward()
    if args.mistake == "zero-late" and number == 0:
        model.zero_grad(set_to_none=True)
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
model.zero_grad(set_to_none=True)
model.save_pretrained(args.out)

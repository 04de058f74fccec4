"""A trainer as people write them, for `thence audit command`: AdamW, gradient accumulation, padding.

Which fault it has is chosen by a flag, so that the tests know what the audit must say.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.audit.optimizers import OPTIMIZERS


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.0, help="0: the optimizer's own")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adamw")
    parser.add_argument("--loss", choices=["tokens", "means", "no-end"], default="tokens")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters")
    parser.add_argument("--init", default="", help="how the adapters begin")
    parser.add_argument("--merge", action="store_true", help="save the model with its adapters merged")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fail", action="store_true")
    parser.add_argument("--also", choices=["", "copies", "average"], default="", help="what else is saved")
    args = parser.parse_args()
    if args.fail:
        sys.exit("the disk of this trainer is full")
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    if args.lora:
        import peft

        settings = peft.LoraConfig(
            r=args.lora, lora_alpha=2 * args.lora, target_modules="all-linear", lora_dropout=args.dropout,
            init_lora_weights=args.init or True, task_type="CAUSAL_LM",
        )  # fmt: skip
        torch.manual_seed(args.seed)
        model = peft.get_peft_model(model, settings)
        model.train()
    rows = [json.loads(line) for line in args.data.read_text().splitlines()]
    encoded = [(tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]) for row in rows]
    window = encoded[: args.micro_batch * args.accumulation]
    begun = {name: value.detach().clone() for name, value in model.state_dict().items()}
    tokens = sum(len(response) for _, response in window)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = OPTIMIZERS[args.optimizer](trained)
    for optimizer in optimizers if args.lr else []:
        optimizer.param_groups[0]["lr"] = args.lr
    for start in range(0, len(window), args.micro_batch):
        micro = window[start : start + args.micro_batch]
        longest = max(len(p) + len(r) for p, r in micro)
        ids = torch.full((len(micro), longest), tokenizer.pad_token_id)
        labels = torch.full((len(micro), longest), -100)
        for i, (prompt, response) in enumerate(micro):
            ids[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
            labels[i, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
            if args.loss == "no-end":
                labels[i, len(prompt) + len(response) - 1] = -100
        logits = model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long()).logits[:, :-1]
        reduction = "mean" if args.loss == "means" else "sum"
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction=reduction
        )
        (loss / (args.accumulation if args.loss == "means" else tokens)).backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    for optimizer in optimizers:
        optimizer.step()
    (model.merge_and_unload() if args.merge else model).save_pretrained(args.out)  # pyright: ignore
    if args.also:
        save_also(args.also, Path(args.out), begun, model.state_dict())


def save_also(what: str, out: Path, begun: dict[str, torch.Tensor], trained: dict[str, torch.Tensor]) -> None:
    """Right copies and an average with its name, or an average that is named as the final model."""
    average = {name: begun[name] + 0.001 * (trained[name] - begun[name]) for name in begun}
    if what == "copies":
        (out / "checkpoint-1").mkdir()
        torch.save(
            {"model": {name: value.bfloat16() for name, value in trained.items()}}, out / "checkpoint-1" / "state.pt"
        )
        torch.save(average, out / "model_ema.pt")
    else:
        torch.save(average, out / "final.pt")


if __name__ == "__main__":
    main()

"""SFT in a plain loop over ranks, as PyTorch's documentation writes it: DDP or FSDP2. Prints one JSON line.

Run it under torchrun. The loss is a sum over tokens divided by the trained tokens of all ranks, so that it takes the
step that thence takes. ``--order batch_rebalance`` sorts a step's rows by length, which leaves less padding.
"""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

import common
from peer_transformers_sft import collate, tokenised


def micro_batches(rows: list[dict[str, Any]], args: argparse.Namespace, rank: int, world: int) -> list[list[Any]]:
    """This rank's micro-batches of one step, equally many on each rank."""
    if args.order != "sequential":
        rows = sorted(rows, key=lambda row: row["length"])
    mine = rows[rank::world]
    return [mine[i : i + args.micro_batch] for i in range(0, len(mine), args.micro_batch)]


def wrap(model: Any, kind: str) -> Any:
    """The model as the two tutorials wrap it; FSDP2 is told to sum."""
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if kind == "ddp":
        return DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    return model


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = wrap(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).train(), args.parallel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    rows, size, clock = (
        tokenised(args.data, tokenizer),
        args.micro_batch * args.accumulation * world,
        common.StepClock(),
    )
    first = {}
    clock.start()
    for step in range(args.warmup + args.steps):
        batch = [rows[(step * size + i) % len(rows)] for i in range(size)]
        trained = sum(label != -100 for row in batch for label in row["labels"])
        total, cut = 0.0, micro_batches(batch, args, rank, world)
        for number, micro in enumerate(cut, 1):
            inputs = collate(micro, tokenizer.pad_token_id)
            labels = inputs.pop("labels")
            clock.count(int(inputs["attention_mask"].sum()), inputs["attention_mask"].numel())
            waits = args.parallel == "ddp" and number < len(cut)
            with model.no_sync() if waits else contextlib.nullcontext():
                logits = model(**inputs).logits
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / trained
                total += float(loss.detach())
                # DDP averages over ranks
                (loss * world if args.parallel == "ddp" else loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not first:
            whole = torch.tensor(total)
            dist.all_reduce(whole)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            first = {"first_loss": whole.item(), "first_gradient_norm": float(norm)}
        clock.end_step()
    common.over_ranks(clock)
    return common.result(
        args,
        clock,
        tool=f"plain loop, {args.parallel}",
        version=torch.__version__,
        counted="prompt + completion + end",
        rows=size,
        order=args.order,
        **first,
    )


def main() -> None:
    parser = common.sft_parser(__doc__)
    parser.add_argument("--parallel", choices=("ddp", "fsdp2"), default="ddp")
    args = parser.parse_args()
    common.set_threads(args.threads)
    common.emit(run(args), args.out)


if __name__ == "__main__":
    main()

"""SFT with thence: float32, CPU, loss on the completion only. Prints one JSON line.

The same rows in the same order as the peers; micro-batches are cut by `--micro-batch-tokens`, as thence always does.
Under torchrun the ranks share each step, laid out by `--parallel`.
"""

from __future__ import annotations

import argparse
from typing import Any

import common


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    import thence
    from thence.data.example import Example
    from thence.methods.base import make_batch
    from thence.methods.sft import SftMethod
    from thence.pipeline.prompts import to_prompts
    from thence.pipeline.sft_stage import trajectories_of
    from thence.recipe import Data, Model
    from thence.train.model import load_model
    from thence.train.parallel import DataParallel, ShardLayout, shard, start_ranks
    from thence.train.policy import Policy
    from thence.train.step import StepSettings

    loaded = load_model(Model(path=str(args.model), compute_dtype="float32"), torch.device("cpu"))
    policy, (ranks, _) = Policy(loaded.model), start_ranks()
    policy.check(args.packing)
    if args.parallel == "fsdp2" and isinstance(ranks, DataParallel):
        ranks = shard(policy, ranks, ShardLayout())
    batch = args.micro_batch * args.accumulation * ranks.world
    examples = [Example(prompt=r["prompt"], demonstration=r["completion"]) for r in common.read_jsonl(args.data)]
    prompts = to_prompts(Data(template="none"), examples, loaded.tokenizer)
    method, clock = SftMethod(), common.StepClock()
    settings = StepSettings(micro_batch_tokens=args.micro_batch_tokens, packing=args.packing)
    trainer = thence.Trainer(policy, args.learning_rate, settings, weight_decay=0.0, ranks=ranks)
    reports = []
    clock.start()
    for step in range(args.warmup + args.steps):
        chosen = [prompts[(step * batch + i) % len(prompts)] for i in range(ranks.rank, batch, ranks.world)]
        report = trainer.step(make_batch(method, trajectories_of(chosen, "response")))
        reports.append(report)
        clock.count(report.tokens, report.tokens)
        clock.end_step()
    return common.result(
        args,
        clock,
        tool="thence",
        version=thence.__version__,
        counted="prompt + completion + end",
        rows=batch,
        first_loss=reports[0].loss,
        first_gradient_norm=reports[0].grad_norm,
        micro_batch_tokens=args.micro_batch_tokens,
        micro_batches=reports[0].micro_batches,
    )


def main() -> None:
    parser = common.sft_parser(__doc__)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--parallel", choices=("ddp", "fsdp2"), default="ddp")
    args = parser.parse_args()
    common.set_threads(args.threads)
    common.emit(run(args), args.out)


if __name__ == "__main__":
    main()

"""The plan says how many bytes a rank sends in a step; here they are counted from the collectives that torch runs.

This file is also the script of the ranks: ``on_each_rank`` runs in each of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.oracle import make_batch, make_case
from tests.tiny_model import make_tiny_model
from tests.train.ranks import run_ranks
from tests.train.test_sharded import BY_NAME, LENGTHS, share_of
from thence.accounting.flops import parameters
from thence.accounting.memory import Held
from thence.accounting.traffic import sampling_traffic, step_traffic
from thence.train.parallel import ShardLayout, shard, start_ranks
from thence.train.policy import Policy
from thence.train.step import StepSettings
from thence.train.trainer import Trainer
from thence.train.weights import named_weights

LAYOUTS: dict[str, dict[str, bool]] = {
    "default": {},
    "weights kept": {"reshard_after_forward": False},
    "sums once a step": {"sum_every_pass": False},
    "both": {"reshard_after_forward": False, "sum_every_pass": False},
}
SMALL = 100
"""Bytes of a collective that carries counts or norms, at most."""


class Counting(TorchDispatchMode):
    """Bytes that this rank would send in a ring, of every collective but the small ones."""

    def __init__(self, sharers: int) -> None:
        super().__init__()
        self.sent, self.sharers = 0, sharers  # a sum that every rank gets is over so many

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = str(func).split(".")[1]
            if name == "_allgather_base_":
                self._add(args[0], args[0].numel() // args[1].numel())
            elif name == "_reduce_scatter_base_":
                self._add(args[1], args[1].numel() // args[0].numel())
            elif name == "allreduce_":
                for tensor in args[0]:
                    self._add(tensor, self.sharers, 2)
            elif name != "barrier":
                raise AssertionError(f"{name} is not counted")
        if func.namespace == "_c10d_functional" and "all_gather_into_tensor" in str(func):
            self.sent += args[0].numel() * args[0].element_size() * (args[1] - 1)
        return func(*args, **(kwargs or {}))

    def _add(self, tensor: torch.Tensor, ranks: int, times: int = 1) -> None:
        if tensor.numel() * tensor.element_size() > SMALL:
            self.sent += times * tensor.numel() * tensor.element_size() * (ranks - 1) // ranks


def on_each_rank(replicas: int) -> dict[str, Any]:
    ranks, _ = start_ranks()
    found = {}
    layouts: dict[str, dict[str, bool] | None] = {**LAYOUTS, "ddp": None} if replicas == 1 else {"default": {}}
    for name, chosen in layouts.items():
        policy, shared = Policy(make_tiny_model(torch.float32)), ranks
        if chosen is not None:
            shared = shard(policy, ranks, ShardLayout(replicas=replicas, **chosen))  # type: ignore[arg-type]
        trainer = Trainer(policy, 1e-3, StepSettings(25), ranks=shared)
        batch = make_batch(make_case(make_tiny_model(), BY_NAME["sft"], LENGTHS, 3, 1), BY_NAME["sft"], torch.float32)
        trainer.step(share_of(batch, "dealt", ranks))
        sharers = ranks.world if replicas == 1 else replicas
        with Counting(sharers) as counting:
            report = trainer.step(share_of(batch, "dealt", ranks))
        passes = max(ranks.gather(report.micro_batches))
        with Counting(sharers) as copying:
            for _ in named_weights(policy):
                pass
        found[name] = (counting.sent, passes, copying.sent, ranks.world)
    return found


@pytest.mark.parametrize(
    ("world", "replicas"), [(2, 1), pytest.param(4, 2, marks=[pytest.mark.slow, pytest.mark.everything])]
)
def test_the_bytes_that_a_rank_sends_are_those_of_the_plan(tmp_path: Path, world: int, replicas: int) -> None:
    counts = parameters(make_tiny_model().config.to_dict())
    for found in run_ranks(tmp_path, "tests.train.test_traffic", world, replicas):
        for name, (sent, passes, copied, ranks) in found.items():
            chosen = LAYOUTS.get(name, {})
            held = Held(
                "ddp" if name == "ddp" else "fsdp2",
                world // replicas,
                reshard=chosen.get("reshard_after_forward", True),
                sum_every_pass=chosen.get("sum_every_pass", True),
            )
            assert passes > 1
            assert sent == sum(line.bytes for line in step_traffic(counts, held, ranks, passes)), name
            assert copied == sum(line.bytes for line in sampling_traffic(counts, held)), name

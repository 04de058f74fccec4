"""Ranks on the device: NCCL with one process, two processes that share it over gloo, one that reads another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from models import VOCAB, tiny
from record import Record
from rows import LENGTHS, relative, sft_batch, trajectories

from thence.train.parallel import DataParallel, Ranks, ShardLayout, SingleProcess, shard
from thence.train.policy import Policy
from thence.train.step import StepSettings
from thence.train.trainer import Trainer
from thence.train.weights import named_weights


def run(device: torch.device, small: bool, record: Record) -> None:
    import torch.distributed as dist

    alone = steps(SingleProcess(), device)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541", "RANK": "0", "WORLD_SIZE": "1"}
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, device_id=torch.device("cuda", 0) if backend == "nccl" else None)
    ranks = DataParallel(device)
    found = steps(ranks, device)
    name = f"one process over {backend}: the parameters of a single process, bit by bit"
    record.true(name, torch.equal(found, alone))
    record.true("gather and wait", ranks.gather({"rank": 0}) == [{"rank": 0}])
    for name, sharding in LAYOUTS.items():
        cut = steps(ranks, device, sharding)
        record.most(
            f"weights cut by FSDP2 over {backend}, {name}: parameters after 3 steps", relative(cut, alone), 1e-5
        )
    ranks.wait()
    dist.destroy_process_group()
    record.most("two processes on this device over gloo, parameters after 3 steps", two_processes(device, alone), 1e-5)
    if device.type == "cuda":
        record.true("weights of this process as another one reads them on this GPU, bit by bit", read_elsewhere(device))


LAYOUTS = {
    "weights freed after each pass": ShardLayout(),
    "weights kept, sums once a step": ShardLayout(reshard_after_forward=False, sum_every_pass=False),
    "weights and optimizer in host memory": ShardLayout(offload=True),
}


def steps(ranks: Ranks, device: torch.device, sharding: ShardLayout | None = None) -> torch.Tensor:
    """The parameters after three steps; every rank takes its share of the rows."""
    policy = Policy(tiny("llama", device=device))
    policy.check()
    if sharding is not None:
        assert isinstance(ranks, DataParallel)
        ranks = shard(policy, ranks, sharding)
    trainer = Trainer(policy, 1e-3, StepSettings(100), ranks=ranks)
    for seed in range(3):
        batch = sft_batch(trajectories(LENGTHS, VOCAB, seed))
        trainer.step(replace(batch, rows=batch.rows[ranks.rank :: ranks.world]))
    return torch.cat([value.flatten().cpu() for _, value in named_weights(policy)])


def two_processes(device: torch.device, alone: torch.Tensor) -> float:
    """How far two ranks end from one process."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"MASTER_PORT": "29542", "WORLD_SIZE": "2"}
        command = [sys.executable, __file__, device.type, folder]
        children = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}) for rank in range(2)]
        codes = [child.wait(timeout=240) for child in children]
        if any(codes):
            raise RuntimeError(f"the ranks ended with {codes}")
        found = [torch.load(Path(folder) / str(rank), weights_only=True) for rank in range(2)]
    if not torch.equal(*found):
        return float("nan")
    return relative(found[0].double(), alone.double())


def read_elsewhere(device: torch.device) -> bool:
    """Whether another process sees this one's tensors over CUDA IPC, as vLLM does with `vllm.transfer = "ipc"`."""
    from thence.rollout.vllm.chunks import on_gpu

    whole = torch.randn(64, 96, device=device)
    held = {"whole": whole, "part": whole[8:, 3:7], "turned": whole.T, "half": whole.bfloat16()}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "chunk.json").write_text(json.dumps(on_gpu(held)), encoding="utf-8")
        subprocess.run([sys.executable, __file__, device.type, folder, "read"], check=True, timeout=240)
        found = torch.load(Path(folder) / "found", weights_only=True)
    return found.keys() == held.keys() and all(torch.equal(found[name], held[name].cpu()) for name in held)


def read_chunk(device: torch.device, folder: Path) -> None:
    from thence.rollout.vllm.transfer import tensors_on_gpu

    chunk = json.loads((folder / "chunk.json").read_text(encoding="utf-8"))
    device = torch.device(device.type, 0)
    found = {name: value.cpu() for name, value in tensors_on_gpu(chunk["tensors"], chunk["gpu"], device)}
    torch.save(found, folder / "found")


def one_of_two(device: torch.device, folder: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    torch.save(steps(DataParallel(device), device), folder / str(dist.get_rank()))
    dist.destroy_process_group()


if __name__ == "__main__":
    act = read_chunk if "read" in sys.argv[3:] else one_of_two
    act(torch.device(sys.argv[1]), Path(sys.argv[2]))

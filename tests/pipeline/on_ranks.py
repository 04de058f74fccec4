"""Runs on several ranks: a driver imports everything once and forks the ranks of every run (gloo).

Each rank writes down what it samples.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

DRIVER = """
import json, os, shutil, socket, sys, threading
from pathlib import Path

import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama

import thence.pipeline.partial as partial
import thence.pipeline.rl_stage as rl_stage
import thence.pipeline.sampler as sampler
import thence.pipeline.sft_stage as sft_stage
import thence.train.parallel as parallel
from thence.pipeline.folder import RunFolder
from thence.pipeline.run import run
from thence.train.parallel import Beside
from thence.train.trainer import Trainer

torch.set_num_threads(1)
os.fsync = lambda handle: None


class Stopped(Exception):
    pass


def listen(folder, rank, stop):
    respond, log, made = sampler.respond, RunFolder.log, []

    def note(found):
        made.extend([t.prompt.index, t.prompt.draw, list(t.prompt.token_ids), list(t.response_ids)] for t in found)
        (folder / f"sampled-{rank}.json").write_text(json.dumps(made))

    def heard(*given, **named):
        found = respond(*given, **named)
        note(found)
        return found

    def whole(batches, at):
        batch = take(batches, at)
        note(batch.trajectories)
        return batch

    def begins(loop, at):
        if at == stop:
            raise Stopped
        return step(loop, at)

    def batch_at(n, batch, seed, at):
        if at == stop:
            raise Stopped
        return batches(n, batch, seed, at)

    step, batches, take = rl_stage.Loop.step, sft_stage.batch_at, partial.Partial.take
    partial.Partial.take = whole
    sampler.respond, rl_stage.Loop.step, sft_stage.batch_at = heard, begins, batch_at


def begin_late(folder, rank):
    begin, step, stepped, late = Beside.begin, Trainer.step, threading.Event(), []

    def later(beside, act):
        stepped.clear()
        begin(beside, lambda: (stepped.wait(2) and note(), act()))

    def note():
        late.append(Trainer.taken)
        (folder / f"late-{rank}.json").write_text(json.dumps(late))

    def steps(trainer, *given, **named):
        report = step(trainer, *given, **named)
        Trainer.taken = trainer.steps_taken
        stepped.set()
        return report

    Beside.begin, Trainer.step = later, steps


def rank_of(case, rank, port):
    folder = Path(case["recipe"]["folder"])
    folder.parent.mkdir(exist_ok=True, parents=True)
    notes = folder.with_name(folder.name + case.get("suffix", "") + "-notes")
    notes.mkdir(exist_ok=True, parents=True)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(case["world"]), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    listen(notes, rank, case.get("stop"))
    if case.get("late"):
        begin_late(notes, rank)
    if rank == 0 and case.get("copy"):
        shutil.copytree(folder, case["copy"])
    try:
        run(case["recipe"])
    except Stopped:
        pass
    except Exception as error:
        import traceback

        (notes / f"error-{rank}").write_text(traceback.format_exc())
    if dist.is_initialized():
        dist.destroy_process_group()


for case in json.loads(Path(sys.argv[1]).read_text()):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(case["world"]):
        child = os.fork()
        if child == 0:
            rank_of(case, rank, port)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
"""


def drive(folder: Path, cases: list[dict[str, Any]], seconds: float = 600) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "driver.py").write_text(DRIVER)
    (folder / "job.json").write_text(json.dumps(cases))
    command = [sys.executable, str(folder / "driver.py"), str(folder / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-3000:]


def case(base: dict[str, Any], folder: Path, world: int, rl: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"recipe": {**base, "folder": str(folder), "rl": {**base["rl"], **rl}}, "world": world, **more}


def sampled(folder: Path, suffix: str = "") -> list[Any]:
    notes = folder.with_name(folder.name + suffix + "-notes")
    errors = [path.read_text() for path in notes.glob("error-*")]
    assert not errors, errors[0]
    return sorted(row for path in notes.glob("sampled-*.json") for row in json.loads(path.read_text()))


def weights(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "stages" / stage / "model" / "model.safetensors")


def largest_difference(a: Path, b: Path, stage: str = "rl") -> float:
    found, expected = weights(a, stage), weights(b, stage)
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(folder: Path, alone: Path) -> None:
    """The same run on ranks as alone: responses one by one, then the weights and what was logged."""
    assert sampled(folder) == sampled(alone)
    assert largest_difference(folder, alone) < 1e-6
    assert_same_lines(folder, alone)


def assert_same_lines(folder: Path, alone: Path) -> None:
    """The same metrics, step by step, to 1e-4."""
    compared = {"loss", "grad_norm", "reward", "accuracy", "response_tokens", "trained_tokens", "flops"}
    for got, expected in zip(lines(folder), lines(alone), strict=True):
        for name in compared & expected.keys():
            assert got[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name

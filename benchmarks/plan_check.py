"""What a plan says, beside what is measured: peak memory of a training step and of sampling, FLOPs, tokens.

    python benchmarks/plan_check.py --out benchmarks/results/plan-check.json

Random Llamas of 28 million parameters, in fresh processes, one thread a rank, float32. Memory is the growth of the peak
resident set over what the process held before it opened the model (Linux only). FLOPs are those that torch's
``FlopCounterMode`` counts in thence's own step, with attention as plain matrix products: torch counts all pairs of
tokens of a row, so that is what the formula is asked for here.

    python benchmarks/plan_check.py --time --out benchmarks/results/plan-check.json     # the machine must be idle

compares the time that the first three steps of a stage let expect with what the stage took.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from common import machine
from ranks.memory import MB, reset_peak, resident

MODEL: dict[str, Any] = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
MODEL |= {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}
MODEL |= {"max_position_embeddings": 8192}
ROW = 256
ANSWER = 12
"""Tokens of a response where sampling is measured; the rest of the row is its prompt, which the cache holds too."""
WITHIN, FLOPS_WITHIN, TIME_WITHIN = 0.10, 0.02, 0.15
PLAIN_MALLOC = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""One arena, and large blocks go back to the system when they are freed: what is resident is what is used."""


@dataclass(frozen=True)
class Setting:
    """One thing that is planned and measured.

    Args:
        name: in words.
        ranks: processes.
        tokens: of a micro-batch; every rank has two of them in a step.
        parallel: none, ddp, fsdp2, hsdp.
        replicas: with hsdp.
        again: activation_checkpointing.
        lora: rank of adapters; 0: the weights are trained.
        packing: rows end to end.
        tied: one matrix for embedding and head.
        sampled: responses sampled in parallel instead of a step; 0: a step.
    """

    name: str
    ranks: int = 1
    tokens: int = 512
    parallel: str = "none"
    replicas: int = 1
    again: bool | int = False
    lora: int = 0
    packing: bool = False
    tied: bool = True
    sampled: int = 0


SETTINGS = (
    Setting("1 process, 256 tokens", tokens=256),
    Setting("1 process, 512 tokens"),
    Setting("1 process, 1,024 tokens", tokens=1024),
    Setting("1 process, 512 tokens, packed", packing=True),
    Setting("1 process, 1,024 tokens, every layer again", tokens=1024, again=True),
    Setting("1 process, 1,024 tokens, every second layer again", tokens=1024, again=2),
    Setting("1 process, 512 tokens, separate head", tied=False),
    Setting("1 process, 512 tokens, LoRA of rank 16", lora=16),
    Setting("ddp, 2 ranks", ranks=2, parallel="ddp"),
    Setting("fsdp2, 2 ranks", ranks=2, parallel="fsdp2"),
    Setting("fsdp2, 4 ranks", ranks=4, parallel="fsdp2"),
    Setting("fsdp2, 2 ranks, every layer again", ranks=2, parallel="fsdp2", again=True),
    Setting("fsdp2, 2 ranks, LoRA of rank 16", ranks=2, parallel="fsdp2", lora=16),
    Setting("hsdp, 2 copies on 4 ranks", ranks=4, parallel="hsdp", replicas=2),
    Setting("sampling 64 rows of 256 tokens", sampled=64),
)


def config_of(setting: Setting) -> dict[str, Any]:
    """The model's configuration."""
    return {**MODEL, "model_type": "llama", "tie_word_embeddings": setting.tied}


def planned(setting: Setting) -> dict[str, float]:
    """Bytes of every line that the plan of a recipe with this setting has, and its peak."""
    from thence.accounting.budget import plan
    from thence.accounting.memory import Memory
    from thence.recipe import load_recipe

    stage = "rl" if setting.sampled else "sft"
    table: dict[str, Any] = {"micro_batch_tokens": setting.tokens, "packing": setting.packing}
    table["activation_checkpointing"] = setting.again
    if setting.sampled:
        table |= {"prompts": setting.sampled, "rollouts": 1, "max_tokens": ANSWER, "rollout_rows": setting.sampled}
    model: dict[str, Any] = {"init": config_of(setting), "tokenizer": "none", "compute_dtype": "float32"}
    if setting.lora:
        model["lora"] = {"rank": setting.lora}
    tables = {"stages": [stage], "model": model, "parallel": setting.parallel, stage: table}
    tables["sharding"] = {"replicas": setting.replicas}
    prompt = ROW - ANSWER if setting.sampled else 8
    found = (
        plan(load_recipe(tables), None, 64, prompt, ROW - prompt, ranks=setting.ranks, on_host=True).stages[0].memory
    )
    assert found is not None
    if setting.sampled:  # nothing was trained before: no moments, no gradients
        found = Memory(tuple(line for line in found.lines if line.phase == "rollout" or line.name == "weights"))
    return {line.name: line.bytes for line in found.lines} | {"peak": found.peak}


def one_rank(setting: Setting, out: Path) -> None:
    """Open a model, take two steps (or sample twice); the first rank writes what every rank measured."""
    import torch

    torch.set_num_threads(1)
    found = [_sampled(setting)] if setting.sampled else _stepped(setting)
    if int(os.environ.get("RANK", "0")) == 0:
        out.write_text(json.dumps(found), encoding="utf-8")


def _model(setting: Setting, changes: Mapping[str, Any] = MappingProxyType({})) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_of(setting) | changes))


def _sampled(setting: Setting) -> dict[str, float]:
    import thence

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    warm = _model(setting, small | {"num_key_value_heads": 2})  # libraries and kernels are loaded
    thence.sample(warm, [[5, 6]] * 2, [0, 1], thence.Sampling(max_tokens=4, rows=2))
    before = resident("VmRSS")
    reset_peak()
    model = _model(setting)
    sampling = thence.Sampling(max_tokens=ANSWER, rows=setting.sampled)
    thence.sample(model, [[5] * (ROW - ANSWER)] * setting.sampled, list(range(setting.sampled)), sampling)
    return {"peak": (resident("VmHWM") - before) * MB}


def _stepped(setting: Setting) -> list[dict[str, float]]:
    from thence.train.parallel import DataParallel, ShardLayout, shard, start_ranks
    from thence.train.policy import Policy
    from thence.train.step import StepSettings
    from thence.train.trainer import Trainer

    _warm(setting)
    ranks: Any = None
    if setting.ranks > 1:
        found, device = start_ranks()
        ranks = found if isinstance(found, DataParallel) else DataParallel.alone(device)
        ranks.wait()
    before = resident("VmRSS")
    reset_peak()
    policy = Policy(_prepared(setting))
    if setting.parallel in ("fsdp2", "hsdp"):
        ranks = shard(policy, ranks, ShardLayout(replicas=setting.replicas))
    settings = StepSettings(setting.tokens, packing=setting.packing)
    trainer = Trainer(policy, 1e-4, settings, **({"ranks": ranks} if ranks is not None else {}))
    seed = 0 if ranks is None else ranks.rank
    trainer.step(batch_of(seed, 1, 16))  # the moments are there now
    reset_peak()
    trainer.step(batch_of(seed, 2 * setting.tokens // ROW, ROW))
    own = {"peak": (resident("VmHWM") - before) * MB}
    return [own] if ranks is None else ranks.gather(own)


def _warm(setting: Setting) -> None:
    """Take a step with a model of nothing, so that libraries and kernels are loaded before anything is measured."""
    from thence.train.policy import Policy
    from thence.train.step import StepSettings
    from thence.train.trainer import Trainer

    nothing = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = _prepared(setting, nothing | {"num_key_value_heads": 2})
    Trainer(Policy(model), 1e-4, StepSettings(64, packing=setting.packing)).step(batch_of(0, 1, 16))


def _prepared(setting: Setting, changes: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """The model, with adapters and checkpoints as a run would have them."""
    from thence.recipe import Lora
    from thence.train.lora import add_adapters
    from thence.train.recompute import recompute

    model = _model(setting, changes)
    if setting.lora:
        add_adapters(model, Lora(rank=setting.lora), 0)
    if setting.again:
        recompute(model, setting.again)
    return model


def batch_of(seed: int, rows: int, length: int) -> Any:
    """Random rows, all of whose tokens are trained but for the first eight of each."""
    import torch

    from thence.objective import Batch, Logp, Normaliser, Row, Term, trained_tokens

    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(rows):
        ids = torch.randint(MODEL["vocab_size"], (length,), generator=generator)
        found.append(Row(ids, trained_tokens(8, length, "response"), torch.ones(1, length - 8), None))
    return Batch((Term("sft", Logp(), Normaliser("tokens")),), tuple(found))


def measure(setting: Setting, folder: Path) -> dict[str, Any]:
    """Planned and measured memory of one setting; MB of 10^6 bytes."""
    out = folder / "found.json"
    command = [sys.executable]
    if setting.ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(setting.ranks)]
    command += [__file__, "--child", setting.name, str(out)]
    subprocess.run(command, check=True, env=os.environ | PLAIN_MALLOC, timeout=900)
    found = json.loads(out.read_text(encoding="utf-8"))
    lines = planned(setting)
    worst = max(rank["peak"] for rank in found)
    return {
        "setting": asdict(setting),
        "lines_mb": {name: round(size / MB, 1) for name, size in lines.items() if name != "peak"},
        "planned_mb": round(lines["peak"] / MB, 1),
        "measured_mb": round(worst / MB, 1),
        "measured / planned": round(worst / lines["peak"], 3),
    }


def count_flops() -> list[dict[str, Any]]:
    """FLOPs of thence's own step as torch counts them, beside the formula's."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from thence.accounting.flops import parameters, training_flops
    from thence.accounting.lora import adapter_parameters
    from thence.recipe import Lora
    from thence.train.policy import Policy
    from thence.train.step import StepSettings
    from thence.train.trainer import Trainer

    torch.set_num_threads(1)
    found = []
    for setting in (each for each in SETTINGS if each.ranks == 1 and not each.sampled and not each.packing):
        model = _prepared(setting)
        model.set_attn_implementation("eager")
        trainer = Trainer(Policy(model), 1e-4, StepSettings(setting.tokens))
        with FlopCounterMode(display=False) as counter:
            report = trainer.step(batch_of(0, setting.tokens // ROW, ROW))
        counts = parameters(config_of(setting))
        adapters = adapter_parameters(counts, Lora(rank=setting.lora)) if setting.lora else 0
        formula = training_flops(
            counts, report.tokens, report.rows * ROW**2, report.trained_tokens, setting.again, adapters
        )
        ratio = counter.get_total_flops() / formula
        found.append({"setting": setting.name, "formula": formula, "counted / formula": round(ratio, 4)})
    return found


def compare_times(steps: int) -> list[dict[str, Any]]:
    """Seconds that the first three steps of a stage let expect, beside what it took: of the quickstart's stages."""
    from thence.pipeline.foreseen import times_of
    from thence.pipeline.run import run

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "run"
        run("quickstart", {"folder": str(place), "sft.steps": steps, "rl.steps": max(steps // 10, 10)})
        return [asdict(time) for time in times_of(place)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan-check.json"))
    parser.add_argument("--only", default="", help="only the settings whose name holds this")
    parser.add_argument("--time", action="store_true", help="compare times; the machine must be idle")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        one_rank(next(each for each in SETTINGS if each.name == given.child[0]), Path(given.child[1]))
        return 0
    if given.time:
        record = kept(given.out)
        record["time"] = {
            "within": TIME_WITHIN,
            "command": "python benchmarks/plan_check.py --time",
            "machine": machine(),
        }
        record["time"]["stages"] = compare_times(200)
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(record["time"], indent=1))
        return 0
    record = kept(given.out)
    with tempfile.TemporaryDirectory() as folder:
        for setting in (each for each in SETTINGS if given.only in each.name):
            line = measure(setting, Path(folder))
            print(
                f"{setting.name}: planned {line['planned_mb']:,.0f} MB, ratio {line['measured / planned']}", flush=True
            )
            record["memory"] = {**record["memory"], setting.name: line}
            given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if not given.only:
        record["FLOPs"] = count_flops()
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for line in record["FLOPs"]:
            print(f"{line['setting']}: FLOPs, counted / formula {line['counted / formula']}")
    off = [line for line in record["memory"].values() if abs(line["measured / planned"] - 1) > WITHIN]
    off += [line for line in record["FLOPs"] if abs(line["counted / formula"] - 1) > FLOPS_WITHIN]
    return 1 if off else 0


def kept(file: Path) -> dict[str, Any]:
    """The record so far: what is measured again takes the place of what stands there."""
    import torch

    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/plan_check.py",
        "torch": torch.__version__,
        "model": MODEL,
        "work": f"two micro-batches a rank in a step, rows of {ROW} tokens, float32; MB of 10^6 bytes",
        "within": {"memory": WITHIN, "FLOPs": FLOPS_WITHIN},
        "memory": before.get("memory", {}),
        "FLOPs": before.get("FLOPs", []),
        "time": before.get("time", "not yet measured: python benchmarks/plan_check.py --time, on an idle machine"),
    }


if __name__ == "__main__":
    sys.exit(main())

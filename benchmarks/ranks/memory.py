"""Peak memory of a rank whose weights are cut by FSDP2, beside the arithmetic of ``--dry-run``.

    python benchmarks/ranks/memory.py --ranks 1 2 4 --out benchmarks/results/ranks-memory.json

A random Llama of the shape of SmolLM2-135M takes two SFT steps in float32 under torchrun (gloo, one thread a rank).
Measured is the growth of the resident set over what the process held before it opened the model. Linux only.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
SIZES |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
ROWS, TOKENS = 2, 512
VARIANTS: dict[str, dict[str, bool]] = {
    "default": {},
    "weights kept": {"reshard_after_forward": False},
    "sums once a step": {"sum_every_pass": False},
}
MB = 1e6


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process, MB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / MB
    raise OSError(f"no {field} in /proc/self/status")


def reset_peak() -> None:
    """Let VmHWM start again at VmRSS."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def one_rank(model: Path, variant: str, out: Path) -> None:
    """Open the model, cut it, take two steps; the first rank writes what every rank measured."""
    import torch

    from thence.pipeline.layout import open_model
    from thence.recipe import Model
    from thence.train.parallel import DataParallel, ShardLayout, shard, start_ranks
    from thence.train.policy import Policy
    from thence.train.step import StepSettings
    from thence.train.trainer import Trainer

    torch.set_num_threads(1)
    ranks, device = start_ranks()
    ranks = ranks if isinstance(ranks, DataParallel) else DataParallel.alone(device)
    ranks.wait()
    before = resident("VmRSS")
    reset_peak()
    settings = Model(path=str(model), compute_dtype="float32")
    policy = Policy(open_model(settings, "fsdp2", ranks, device, seed=0).model)
    parameters = sum(p.numel() for p in policy.model.parameters())
    shared = shard(policy, ranks, ShardLayout(**VARIANTS[variant]))
    found = {"loading_peak_mb": resident("VmHWM") - before, "loaded_mb": resident("VmRSS") - before}
    trainer = Trainer(policy, 1e-4, StepSettings(TOKENS), ranks=shared)
    batch = make_batch(ranks.rank)
    trainer.step(batch)
    reset_peak()
    trainer.step(batch)  # the moments are there now
    found |= {"peak_mb": resident("VmHWM") - before, "held_mb": resident("VmRSS") - before}
    every = shared.gather({name: round(value, 1) for name, value in found.items()})
    if ranks.rank == 0:
        out.write_text(json.dumps({"parameters": parameters, "ranks": every}), encoding="utf-8")


def make_batch(seed: int) -> Any:
    """Random rows whose tokens are trained but for the first eight."""
    import torch

    from thence.objective import Batch, Logp, Normaliser, Row, Term, trained_tokens

    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(ROWS):
        ids = torch.randint(SIZES["vocab_size"], (TOKENS,), generator=generator)
        rows.append(Row(ids, trained_tokens(8, TOKENS, "response"), torch.ones(1, TOKENS - 8), None))
    return Batch((Term("sft", Logp(), Normaliser("tokens")),), tuple(rows))


def formula(world: int, variant: str) -> dict[str, Any]:
    """What the plan says of one rank, in MB: every line, the peak of training, and one whole copy on the host."""
    from thence.accounting.flops import parameters
    from thence.accounting.memory import Held, Memory, activation_memory, logit_memory, state_memory

    counts, chosen = parameters({**SIZES, "model_type": "llama"}), VARIANTS[variant]
    held = Held(
        "fsdp2",
        world,
        reshard=chosen.get("reshard_after_forward", True),
        sum_every_pass=chosen.get("sum_every_pass", True),
    )
    lines = (*state_memory(counts, held), activation_memory(counts, TOKENS), *logit_memory(counts, TOKENS))
    found = {line.name: round(line.bytes / MB, 1) for line in lines}
    whole = round(TOKENS * counts.vocab * 12 / MB, 1)
    peak, copy = round(Memory(lines).peak / MB, 1), round(counts.total * 4 / MB, 1)
    return {"lines": found, "peak_mb": peak, "copy_mb": copy, "logits_if_whole_mb": whole}


def measure(world: int, variant: str, model: Path) -> dict[str, Any]:
    """All ranks of one run, and the formula."""
    out = model / f"found-{world}-{variant}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), __file__]
    command += ["--child", str(model), variant, str(out)]
    # one arena, and large blocks go back to the system when they are freed: what is resident is what is used
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    subprocess.run(command, check=True, env=os.environ | settings)
    found, planned = json.loads(out.read_text(encoding="utf-8")), formula(world, variant)
    worst = max(rank["peak_mb"] for rank in found["ranks"])
    ratio = round(worst / planned["peak_mb"], 3)
    return {"world": world, "variant": variant, "formula": planned, "peak_over_formula": ratio, **found}


def make_model(folder: Path) -> None:
    """A random model in a Hugging Face folder, with a tokenizer of one word a token."""
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(SIZES["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", pad_token="w2").save_pretrained(folder)
    config = AutoConfig.for_model("llama", **SIZES, max_position_embeddings=2048)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ranks-memory.json"))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        one_rank(Path(given.child[0]), given.child[1], Path(given.child[2]))
        return 0
    import torch

    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        plans = [(world, "default") for world in given.ranks] + [(2, name) for name in list(VARIANTS)[1:]]
        found = [measure(world, variant, Path(folder)) for world, variant in plans]
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "work": f"SFT in float32, {ROWS} rows of {TOKENS} tokens a rank, one row a micro-batch; MB of 10^6 bytes",
        "runs": found,
    }
    given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for run in found:
        how = f"{run['world']} ranks, {run['variant']}"
        print(f"{how}: planned {run['formula']['peak_mb']:,.0f} MB, measured / planned {run['peak_over_formula']}")
        for rank in run["ranks"]:
            print("   ", ", ".join(f"{name} {value:,.0f}" for name, value in rank.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

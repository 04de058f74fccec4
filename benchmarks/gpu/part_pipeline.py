"""A short quickstart end to end: run, killed with SIGKILL and resumed, its report, its model on a CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import Record

SETTINGS = {
    "sft.data": "{limit = 1024}",
    "sft.epochs": "1",
    "sft.checkpoint_every": "4",
    "rl.steps": "8",
    "rl.prompts": "32",
    "rl.checkpoint_every": "2",
    "eval.samples": "2",
    "eval.splits": '{in-distribution = {split = "test", limit = 128}}',
}
SMALL = {"sft.data": "{limit = 128}", "rl.prompts": "4", "rl.steps": "4", "rl.rollouts": "4", "rl.max_tokens": "48"}
SMALL |= {"eval.splits": '{in-distribution = {split = "test", limit = 8}}', "eval.max_tokens": "48"}


def run(device: torch.device, small: bool, record: Record) -> None:
    with tempfile.TemporaryDirectory(prefix="thence-gpu-") as folder:
        for dtype in ("bfloat16", "float32"):
            one_recipe(Path(folder) / dtype, dtype, device, small, record)


def one_recipe(folder: Path, dtype: str, device: torch.device, small: bool, record: Record) -> None:
    """Two undisturbed runs and one that is killed twice, side by side; then what they left."""
    settings = SETTINGS | {"model.compute_dtype": dtype} | (SMALL if small else {})
    start = time.perf_counter()
    children = {name: launch(folder / name, settings, device) for name in ("first", "second")}
    points = [("rl", 3)] if small else [("sft", 6), ("rl", 3)]
    died = [killed(folder / "killed", settings, device, stage, step) for stage, step in points]
    children["killed"] = launch(folder / "killed", settings, device)
    outputs = {name: child.communicate(timeout=400) for name, child in children.items()}
    for name, child in children.items():
        said = outputs[name][1][-1500:] if child.returncode else ""
        record.true(f"{dtype} {name}: the run ends well", child.returncode == 0, said)
    if any(child.returncode for child in children.values()):
        return
    record.true(f"{dtype}: killed by SIGKILL where it was meant to be", all(died))
    record.figure(f"{dtype}: seconds of the three runs side by side", round(time.perf_counter() - start, 1))
    describe(folder, dtype, record)
    opens_on_cpu(folder / "first" / "stages" / "rl" / "model", dtype, record)


def launch(folder: Path, settings: dict[str, str], device: torch.device) -> subprocess.Popen[str]:
    """Start `thence run quickstart` there."""
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    environment = dict(os.environ) if device.type == "cuda" else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "thence", "run", "quickstart", "--folder", str(folder), *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def killed(folder: Path, settings: dict[str, str], device: torch.device, stage: str, step: int) -> bool:
    """Start the run and kill it with SIGKILL when it has logged this step. Returns whether that is how it ended."""
    child = launch(folder, settings, device)
    while child.poll() is None:
        lines = metrics(folder)
        if any(line["stage"] == stage and line["step"] >= step for line in lines):
            child.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    child.communicate()
    return child.returncode == -signal.SIGKILL


def metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def describe(folder: Path, dtype: str, record: Record) -> None:
    """Same bits or not, how far apart, metrics complete, report there."""
    from safetensors.torch import load_file

    weights = {}
    for name in ("first", "second", "killed"):
        found = load_file(folder / name / "stages" / "rl" / "model" / "model.safetensors")
        weights[name] = torch.cat([found[key].double().flatten() for key in sorted(found)])
    base = weights["first"]
    for name in ("second", "killed"):
        other = weights[name]
        record.figure(f"{dtype} {name} against first: same bits", bool(torch.equal(base, other)))
        record.figure(f"{dtype} {name} against first: relative distance", float((base - other).norm() / base.norm()))
    kept = {name: metrics(folder / name) for name in weights}
    steps = {name: [(line["stage"], line["step"]) for line in lines] for name, lines in kept.items()}
    record.true(f"{dtype}: the killed run logged every step once", steps["killed"] == steps["first"])
    if importlib.util.find_spec("matplotlib"):
        pages = [(folder / n / "report.html").stat().st_size for n in weights]
        record.true(f"{dtype}: the report is written", min(pages) > 10_000)
    for name, lines in kept.items():
        sft, rl = ([line for line in lines if line["kind"] == kind] for kind in ("sft", "rl"))
        record.figure(
            f"{dtype} {name}",
            {
                "first SFT loss": sft[0]["loss"],
                "last SFT loss": sft[-1]["loss"],
                "reward of the first RL step": rl[0]["reward"],
                "of the last": rl[-1]["reward"],
                "unknown verdicts": sum(line["unknown"] for line in rl),
                "largest mismatch_kl": max(line["mismatch_kl"] for line in rl),
                "SFT tokens/s": sorted(line["tokens_per_s"] for line in sft)[len(sft) // 2],
            },
        )
    environment = json.loads((folder / "first" / "environment.json").read_text(encoding="utf-8"))
    record.figure(f"{dtype} device in environment.json", environment["device"])


OPEN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not torch.cuda.is_available()
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
out = model.generate(torch.tensor([[2, 3, 4]]), max_new_tokens=5)
print(next(model.parameters()).dtype, tuple(out.shape))
"""


def opens_on_cpu(model: Path, dtype: str, record: Record) -> None:
    """The model that the run wrote, opened by transformers in a process that sees no GPU."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(model)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    said = done.stdout.strip() or done.stderr[-800:]
    record.true(f"{dtype}: transformers opens the model on a CPU", done.returncode == 0, said)

"""What the scripts of one benchmark share: the sizes, the reward, the measuring, the flags.

torch and transformers are imported late, because the number of threads has to be set before.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

SFT_BATCH = 64
PROMPTS, GENERATIONS, NEW_TOKENS = 32, 8, 64
SEED = 20


def reward(text: str) -> float:
    """The reward of a rollout: the share of its characters that are digits, in [0, 1]; 0 for no text."""
    return sum(character.isdigit() for character in text) / len(text) if text else 0.0


def read_jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digest(path: Path) -> str:
    """sha256 of a data file, or of the weights in a model folder; the first 16 hexadecimal digits."""
    path = path / "model.safetensors" if path.is_dir() else path
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


# --- Measuring -------------------------------------------------------------------------------------------------------


class StepClock:
    """Wall time and tokens of every optimizer step (or `generate` call).

    A step lasts from the end of the one before to its own end, so that fetching data and logging are inside.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.slots: list[int] = []
        self.rss_at_start_mb = 0.0
        self._mark = self._pending_tokens = self._pending_slots = 0.0

    def start(self) -> None:
        self.rss_at_start_mb = memory_mb("VmRSS")
        self._mark = time.perf_counter()

    def count(self, tokens: int, slots: int) -> None:
        """Add `tokens` real tokens among `slots` computed positions to the step that is running."""
        self._pending_tokens += tokens
        self._pending_slots += slots

    def end_step(self) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._mark)
        self.tokens.append(int(self._pending_tokens))
        self.slots.append(int(self._pending_slots))
        self._mark, self._pending_tokens, self._pending_slots = now, 0.0, 0.0


def over_ranks(clock: StepClock) -> None:
    """Sum the counted tokens over the ranks, where there are several; they take their steps together."""
    import torch
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        counted = torch.tensor([clock.tokens, clock.slots])
        dist.all_reduce(counted)
        clock.tokens, clock.slots = counted.tolist()


def world() -> int:
    """How many ranks share a step."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def memory_mb(field: str) -> float:
    """VmHWM (peak) or VmRSS (now) of this process in MiB.

    Not `ru_maxrss` where it can be helped: Linux lets that start from the peak of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(f"{field}:"))
        return int(line.split()[1]) / 1024
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def machine() -> dict[str, Any]:
    """CPU name and cores, versions, load, and what a float32 matrix product reaches now: says whether it was idle."""
    import torch

    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = (line.split(":", 1)[1] for line in info.read_text().splitlines() if line.startswith("model name"))
        cpu = next(names, cpu).strip()
    a = torch.ones(1024, 1024)
    torch.mm(a, a)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - start)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gemm_gflops": round(2 * 1024**3 / min(times) / 1e9, 1),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def result(
    args: argparse.Namespace, clock: StepClock, *, tool: str, version: str, counted: str, rows: int, **more: Any
) -> dict[str, Any]:
    """The JSON object that a benchmark script prints: `tokens_per_s` and the like leave out the warm-up steps.

    `workload` must be the same on both sides of a comparison; `compare.py` refuses it otherwise.
    """
    peak = memory_mb("VmHWM")
    kept = slice(args.warmup, None)
    seconds, tokens, slots = clock.seconds[kept], clock.tokens[kept], clock.slots[kept]
    if not seconds:
        raise SystemExit(f"{len(clock.seconds)} steps, {args.warmup} of them warm-up: nothing left to report")
    mode = {key: getattr(args, key) for key in ("length",) if hasattr(args, key)}
    return {
        "tool": tool,
        "version": version,
        "workload": {
            "model": digest(args.model),
            "data": digest(args.data),
            "rows_per_step": rows,
            "precision": "float32",
            "threads": args.threads,
            "ranks": world(),
            "counted": counted,
            **mode,
        },
        "tokens_per_s": sum(tokens) / sum(seconds),
        "median_step_seconds": statistics.median(seconds),
        "step_seconds": [round(x, 5) for x in seconds],
        "step_tokens": tokens,
        "padding_share": 1 - sum(tokens) / max(1, sum(slots)),
        "warmup_steps": args.warmup,
        "warmup_seconds": [round(x, 5) for x in clock.seconds[: args.warmup]],
        "peak_rss_mb": round(peak, 1),
        "rss_at_start_mb": round(clock.rss_at_start_mb, 1),
        "machine": machine(),
        **more,
    }


def emit(record: dict[str, Any], out: Path | None) -> None:
    """Print `record` as the one line on standard output; also write it to `out`. Of several ranks, the first does."""
    if os.environ.get("RANK", "0") != "0":
        return
    line = json.dumps(record)
    print(line, flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(line + "\n", encoding="utf-8")


# --- The Hugging Face trainers ---------------------------------------------------------------------------------------


def step_callback(clock: StepClock) -> Any:
    """A callback that tells `clock` when training starts and when an optimizer step has ended."""
    from transformers import TrainerCallback

    class ClockCallback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.end_step()

    return ClockCallback()


def counting(trainer: type, clock: StepClock) -> type:
    """A subclass of an SFT `trainer` that counts the tokens (prompt, completion, end) it trains on, and padding."""

    class CountingTrainer(trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs["attention_mask"]
            clock.count(int(mask.sum()), mask.numel())
            return super().training_step(model, inputs, *args, **kwargs)

    return CountingTrainer


def trainer_settings(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """The training arguments of every Hugging Face trainer here: float32 on CPU, nothing saved, constant rate."""
    ranks = {"ddp_backend": "gloo"} if "RANK" in os.environ else {}
    return {
        **ranks,
        "output_dir": folder,
        "max_steps": args.warmup + args.steps,
        "per_device_train_batch_size": args.micro_batch,
        "gradient_accumulation_steps": args.accumulation,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "lr_scheduler_type": "constant",
        "seed": args.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def train(trainer: Any, args: argparse.Namespace, clock: StepClock) -> dict[str, Any]:
    """Train, with everything that is printed sent to standard error; returns what to report of the log.

    The loss and gradient norm of the first step are a check that both sides do the same work.
    """
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    over_ranks(clock)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "first_loss": logs[0]["loss"],
        "first_gradient_norm": logs[0]["grad_norm"],
        "optimizer": str(getattr(trainer.args.optim, "value", trainer.args.optim)),
        "micro_batch": args.micro_batch,
        "accumulation": args.accumulation,
    }


def parser(description: str | None, *, micro_batch: int, accumulation: int) -> argparse.ArgumentParser:
    """The flags that every benchmark script takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--data", type=Path, required=True, help="JSONL file")
    parser.add_argument("--steps", type=int, default=10, help="measured steps, without the warm-up")
    parser.add_argument("--warmup", type=int, default=2, help="steps before that, left out of every figure")
    parser.add_argument("--micro-batch", type=int, default=micro_batch, help="rows in one forward and backward")
    parser.add_argument("--accumulation", type=int, default=accumulation, help="micro-batches in one step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, help="also write the JSON line to this file")
    return parser


def sft_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags of the SFT scripts."""
    result = parser(description, micro_batch=8, accumulation=SFT_BATCH // 8)
    result.add_argument("--learning-rate", type=float, default=1e-5)
    result.add_argument(
        "--order",
        choices=("sequential", "group_by_length", "batch_rebalance"),
        default="sequential",
        help="the trainer's own `train_sampling_strategy`",
    )
    return result


def add_length(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--length", choices=("forced", "uneven"), default="forced", help="may a rollout end early")


def set_threads(threads: int) -> None:
    """Fix the number of threads, and keep the Hugging Face libraries off the network. Before torch is imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    import torch

    torch.set_num_threads(threads)

"""A model of real size on the device: SFT beside transformers' Trainer and the roofline, GRPO, sampling, memory."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from models import real
from part_sampler import mismatch
from record import Record

from thence.accounting.flops import parameters
from thence.accounting.memory import (
    Held,
    Memory,
    activation_memory,
    logit_memory,
    readable,
    rollout_memory,
    state_memory,
)
from thence.data.trajectory import Prompt, Trajectory
from thence.methods.base import make_batch
from thence.methods.grpo import Grpo
from thence.methods.sft import SftMethod
from thence.objective import Batch
from thence.rollout.native import Sampling, sample
from thence.train.policy import Policy
from thence.train.step import StepSettings, policy_statistics
from thence.train.trainer import Trainer

BUDGET, STEPS, WARMUP = 8192, 3, 2


def run(device: torch.device, small: bool, record: Record) -> None:
    rate = matmul_rate(device, 1024 if small else 8192)
    record.figure("bfloat16 matrix product, TFLOP/s", rate / 1e12)
    record.figure("float32 matrix product, TFLOP/s", matmul_rate(device, 1024 if small else 8192, torch.float32) / 1e12)
    model = real(device, small)
    n = sum(p.numel() for p in model.parameters())
    record.figure("parameters", n)
    uneven, even = sft_rows(small, device, model.config.vocab_size)
    for name, rows in (("uneven rows", uneven), ("rows of one length", even)):
        for packing in (False, True):
            ours(f"SFT, {name}, {'packed' if packing else 'padded'}", model, rows, packing, n, rate, device, record)
    ours("SFT, uneven rows, packed, checkpointed, 16k", model, uneven, True, n, rate, device, record, 2 * BUDGET)
    if not small:
        profile(model, uneven, device, record)
    del model
    free(device)
    for name, rows in (("uneven rows", uneven), ("rows of one length", even)):
        theirs(f"transformers Trainer, {name}", rows, n, rate, device, small, record)
    grpo(device, small, record)
    half(uneven, rate, device, small, record)


def half(rows: Sequence[Trajectory], rate: float, device: torch.device, small: bool, record: Record) -> None:
    """The model of half a billion parameters: SFT beside transformers' Trainer."""
    free(device)
    model = real(device, small, half=True)
    n = sum(p.numel() for p in model.parameters())
    record.figure("0.5B: parameters", n)
    for packing in (False, True):
        ours(f"0.5B: SFT, {'packed' if packing else 'padded'}", model, rows, packing, n, rate, device, record)
    del model
    theirs("0.5B: transformers Trainer", rows, n, rate, device, small, record, half=True)


def matmul_rate(device: torch.device, size: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP/s of a large product of random matrices: the ceiling of everything below."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / statistics.median(timed(lambda: a @ b, device) for _ in range(8))


def timed(action: Callable[[], Any], device: torch.device) -> float:
    """Seconds of an action, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def free(device: torch.device) -> None:
    """Give back what is not used, and measure the peak from here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def sft_rows(small: bool, device: torch.device, vocabulary: int) -> tuple[list[Trajectory], list[Trajectory]]:
    """64 rows with a heavy tail of lengths (100 to 2048 tokens, a quarter of them prompt), and 64 of 1024 tokens."""
    generator = torch.Generator().manual_seed(3)
    count, scale = (6, 0.05) if small else (64, 1.0)
    drawn = (torch.randn(count, generator=generator) * 0.7 + 6.2).exp().clamp(100, 2048) * scale
    made = []
    for lengths in (drawn.int().tolist(), [int(1024 * scale)] * count):
        rows = []
        for i, length in enumerate(lengths):
            ids = torch.randint(vocabulary, (length,), generator=generator).tolist()
            rows.append(Trajectory(Prompt(i, tuple(ids[: length // 4])), tuple(ids[length // 4 :])))
        made.append(rows)
    return made[0], made[1]


def _take(trainer: Trainer, batch: Batch, reports: list[Any]) -> None:
    reports.append(trainer.step(batch))


def ours(
    name: str,
    model: Any,
    trajectories: Sequence[Trajectory],
    packing: bool,
    n: int,
    rate: float,
    device: torch.device,
    record: Record,
    budget: int = BUDGET,
) -> None:
    """thence's own step on these rows: tokens/s, share of the roofline, peak memory beside the plan."""
    free(device)
    method, checkpointing = SftMethod(), budget > BUDGET
    batch = make_batch(method, trajectories)
    trainer = Trainer(
        model, 1e-6, StepSettings(budget, packing, 1.0, torch.bfloat16), activation_checkpointing=checkpointing
    )
    reports = []
    take = partial(_take, trainer, batch, reports)
    seconds = [timed(take, device) for _ in range(WARMUP + STEPS)][WARMUP:]
    tokens = sum(len(row.token_ids) for row in batch.rows)
    record.figure(name, speed(tokens, seconds, n, rate) | {"micro_batches": reports[-1].micro_batches})
    record.figures[f"{name}, first"] = {"loss": reports[0].loss, "grad_norm": reports[0].grad_norm}
    if device.type == "cuda":
        peak, planned = torch.cuda.max_memory_allocated(), training_plan(model, budget, checkpointing)
        memory = {"peak": readable(peak), "planned": readable(planned), "ratio": peak / planned}
        record.figure(f"{name}, memory", memory)
    if checkpointing:
        model.gradient_checkpointing_disable()
        model.eval()
    model.zero_grad(set_to_none=True)
    del trainer


def training_plan(model: Any, budget: int, checkpointing: bool) -> int:
    """Bytes that `thence run --dry-run` would plan for such a step."""
    counts = parameters(model.config.to_dict())
    lines = (
        *state_memory(counts, Held(compute_bytes=2)),
        activation_memory(counts, budget, 2, checkpointing),
        *logit_memory(counts, budget),
    )
    return Memory(lines).peak


def speed(tokens: int, seconds: Sequence[float], n: int, rate: float) -> dict[str, float]:
    """Tokens a second and what share of the matrix rate 6 N a token is."""
    per_second = tokens / statistics.median(seconds)
    return {"tokens_per_s": per_second, "of_roofline": per_second * 6 * n / rate, "step_seconds": min(seconds)}


def profile(model: Any, trajectories: Sequence[Trajectory], device: torch.device, record: Record) -> None:
    """Which kernels the time of a packed step goes to."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    method = SftMethod()
    batch = make_batch(method, trajectories)
    trainer = Trainer(model, 1e-6, StepSettings(BUDGET, True, 1.0, torch.bfloat16))
    trainer.step(batch)
    with torch_profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        seconds = timed(lambda: trainer.step(batch), device)
    by_kernel: dict[str, list[float]] = {}
    for event in found.key_averages():
        if event.device_type.name == "CUDA":
            by_kernel[event.key[:90]] = [event.self_device_time_total / 1e6, event.count]
    ordered = sorted(by_kernel.items(), key=lambda item: -item[1][0])
    record.figures["profile of a packed step"] = {
        "seconds": seconds,
        "busy_seconds": sum(value[0] for value in by_kernel.values()),
        "kernels": [{"name": k, "seconds": round(v[0], 5), "calls": int(v[1])} for k, v in ordered[:25]],
    }
    print(f"   profiled step {seconds:.3f} s, device busy {sum(v[0] for v in by_kernel.values()):.3f} s")
    for kernel, (busy, calls) in ordered[:18]:
        print(f"     {busy:8.4f} s {int(calls):6d} x {kernel}")
    model.zero_grad(set_to_none=True)


def theirs(
    name: str,
    trajectories: Sequence[Trajectory],
    n: int,
    rate: float,
    device: torch.device,
    small: bool,
    record: Record,
    half: bool = False,
) -> None:
    """transformers' Trainer on the same rows in bfloat16: as many tokens a micro-batch, rows grouped by length."""
    from transformers import Trainer as Peer
    from transformers import TrainerCallback, TrainingArguments

    free(device)
    rows = sorted(trajectories, key=lambda t: -len(t.prompt.token_ids) - len(t.response_ids))
    longest = len(rows[0].prompt.token_ids) + len(rows[0].response_ids)
    per_micro = max(1, (BUDGET if not small else 128) // longest)
    per_micro = max(k for k in range(1, per_micro + 1) if len(rows) % k == 0)
    items = [example(row) for row in rows] * (WARMUP + STEPS)
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            synchronize(device)
            marks.append(time.perf_counter())

    class InOrder(Peer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(items)

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=WARMUP + STEPS,
            per_device_train_batch_size=per_micro,
            gradient_accumulation_steps=len(rows) // per_micro,
            bf16=True,
            use_cpu=device.type == "cpu",
            optim="adamw_torch_fused",
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        model = real(device, small, half)
        model.config.use_cache = False
        peer = InOrder(model=model, args=settings, train_dataset=items, data_collator=collate, callbacks=[Clock()])
        peer.train()
    seconds = [after - before for before, after in zip(marks[WARMUP - 1 :], marks[WARMUP:], strict=False)]
    tokens = sum(len(row.prompt.token_ids) + len(row.response_ids) for row in rows)
    record.figure(name, speed(tokens, seconds, n, rate) | {"rows_a_micro_batch": per_micro})
    logs = [entry for entry in peer.state.log_history if "loss" in entry]
    record.figures[f"{name}, first"] = {key: logs[0][key] for key in ("loss", "grad_norm")}
    if device.type == "cuda":
        record.figure(f"{name}, peak memory", readable(torch.cuda.max_memory_allocated()))
    del peer, model
    free(device)


def example(row: Trajectory) -> dict[str, list[int]]:
    ids = [*row.prompt.token_ids, *row.response_ids]
    return {"input_ids": ids, "labels": [-100] * len(row.prompt.token_ids) + list(row.response_ids)}


def collate(items: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Padded on the right, as the models expect it."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([torch.tensor(item["input_ids"]) for item in items], batch_first=True)
    labels = pad([torch.tensor(item["labels"]) for item in items], batch_first=True, padding_value=-100)
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    seen = torch.arange(ids.shape[1]) < lengths[:, None]
    return {"input_ids": ids, "labels": labels, "attention_mask": seen.long()}


def grpo(device: torch.device, small: bool, record: Record) -> None:
    """A GRPO step in its parts, and the sampler beside transformers' generate on the same prompts."""
    free(device)
    model, tokens = real(device, small), 16 if small else 128
    generator = torch.Generator().manual_seed(5)
    distinct = [torch.randint(model.config.vocab_size, (96,), generator=generator).tolist() for _ in range(32)]
    prompts = [prompt for prompt in distinct for _ in range(2 if small else 8)]
    sampling = Sampling(tokens, rows=len(prompts))
    for _ in range(2):
        free(device)
        found, start = [], time.perf_counter()
        found = sample(model, prompts, list(range(len(prompts))), sampling)
        seconds = time.perf_counter() - start
    record.figure("sampling in float32, tokens/s", len(prompts) * tokens / seconds)
    if device.type == "cuda":
        counts, peak = parameters(model.config.to_dict()), torch.cuda.max_memory_allocated()
        lines = (*state_memory(counts)[:1], *rollout_memory(counts, len(prompts), 96 + tokens))
        planned = sum(line.bytes for line in lines)
        memory = {"peak": readable(peak), "planned": readable(planned), "ratio": peak / planned}
        record.figure("sampling, memory", memory)
    for dtype in (torch.float32, torch.bfloat16):
        measured = mismatch(model, prompts, found, dtype)
        record.figure(f"trained in {str(dtype)[6:]}, sampled in float32", measured)
    method = Grpo()
    rolled = [
        Trajectory(Prompt(i // 8, tuple(p)), tuple(r.token_ids), score=float(i % 3 == 0))
        for i, (p, r) in enumerate(zip(prompts, found, strict=True))
    ]
    batch = make_batch(method, rolled)
    settings = StepSettings(BUDGET, False, 1.0, torch.bfloat16)
    trainer = Trainer(model, 1e-6, settings)
    parts: dict[str, float] = {"sampling": seconds}
    for _ in range(2):
        scoring = timed(lambda: policy_statistics(Policy(model), batch.rows, 1.0, settings), device)
        parts["old log-probabilities"] = scoring
        parts["step"] = timed(lambda: trainer.step(batch), device)
    record.figure("GRPO, seconds", parts)
    trainer = None
    model.zero_grad(set_to_none=True)
    peers(model, prompts, tokens, device, record)


def peers(model: Any, prompts: Sequence[list[int]], tokens: int, device: torch.device, record: Record) -> None:
    """transformers' generate: the same float32 weights, and rounded to bfloat16."""
    free(device)
    ids = torch.tensor(list(prompts), device=device)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        model.config.use_cache = True
        options: dict[str, Any] = {"do_sample": True, "top_k": 0, "max_new_tokens": tokens, "min_new_tokens": tokens}
        with torch.no_grad():
            seen = torch.ones_like(ids)
            generate = partial(model.generate, ids, attention_mask=seen, eos_token_id=-1, pad_token_id=0, **options)
            seconds = min(timed(generate, device) for _ in range(2))
        record.figure(f"transformers generate in {str(dtype)[6:]}, tokens/s", len(prompts) * tokens / seconds)

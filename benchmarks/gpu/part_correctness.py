"""The step on the device against float64 on the CPU: loss and gradient, family by family."""

from __future__ import annotations

import time
from typing import Any

import torch
from models import MIDDLE, TINY, VOCAB, build, tiny
from record import Record
from rows import LENGTHS, cosine, engine, grpo_batch, plain, relative, sft_batch, trajectories

from thence.errors import UserError
from thence.train.policy import Policy
from thence.train.step import StepSettings, policy_statistics
from thence.train.trainer import Trainer

FLOAT32, TF32, BF16_COSINE = 2e-5, 1e-2, 0.995
CUTS = [(10**6, False), (50, False), (120, False), (10**6, True), (50, True), (120, True)]


def run(device: torch.device, small: bool, record: Record) -> None:
    record.figure("float32 matmul precision (thence sets none)", torch.get_float32_matmul_precision())
    for kind in list(TINY)[:2] if small else TINY:
        try:
            one_family(kind, device, record)
        except UserError as error:
            record.figure(f"{kind} refused", str(error).splitlines()[0])
    middle(device, small, record)
    repeats(device, small, record)


def one_family(kind: str, device: torch.device, record: Record) -> None:
    """Padded, packed, cut, checkpointed and silent rows of one family in float32; then TF32 and bfloat16."""
    rows = trajectories(LENGTHS, VOCAB)
    exact = tiny(kind, torch.float64)
    loss, vector = plain(exact, rows)
    on_cpu = relative(engine(tiny(kind), sft_batch(rows))[1], vector)
    batch, worst, worst_loss = sft_batch(rows), {}, 0.0
    for packing in (False, True):
        model = tiny(kind, device=device)
        for budget, packed in CUTS:
            if packed != packing:
                continue
            got_loss, got = engine(model, batch, budget, packing)
            name = "packed" if packing else "padded"
            worst[name] = max(worst.get(name, 0.0), relative(got, vector))
            worst_loss = max(worst_loss, abs(got_loss - loss) / abs(loss))
    silent = plain(exact, rows, silent=True)[1]
    worst["silent rows"] = relative(engine(tiny(kind, device=device), sft_batch(rows, silent=True), 90)[1], silent)
    again = tiny(kind, device=device)
    Trainer(again, 0.0, activation_checkpointing=True)
    worst["checkpointed"] = relative(engine(again, batch, 120)[1], vector)
    old = [
        logp for logp, _ in policy_statistics(Policy(exact), batch.rows, 0.8, StepSettings(compute_dtype=torch.float64))
    ]
    moved = grpo_batch(rows, old)
    moved_vector = engine(exact, moved, dtype=torch.float64)[1]
    worst["GRPO with KL and entropy"] = relative(engine(tiny(kind, device=device), moved, 90, True)[1], moved_vector)
    record.figures[f"{kind} float32 gradient"] = {**worst, "loss": worst_loss, "float32 on the CPU": on_cpu}
    for name, error in worst.items():
        record.most(f"{kind} {name}, float32 gradient", error, FLOAT32)
    record.most(f"{kind} float32 loss", worst_loss, FLOAT32)
    lower_precision(kind, device, rows, vector, record)


def lower_precision(kind: str, device: torch.device, rows: list, vector: torch.Tensor, record: Record) -> None:
    """What TF32 and bfloat16 autocast cost; both padded and packed."""
    batch, found = sft_batch(rows), {}
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        found["TF32"] = relative(engine(tiny(kind, device=device), batch)[1], vector)
        torch.set_float32_matmul_precision("highest")
        record.most(f"{kind} gradient with TF32 allowed", found["TF32"], TF32)
    for packing in (False, True):
        name = "bfloat16 packed" if packing else "bfloat16 padded"
        got = engine(tiny(kind, device=device), batch, 120, packing, torch.bfloat16)[1]
        found[name], found[f"{name} cosine"] = relative(got, vector), cosine(got, vector)
        # a router may send a token to another expert where the two are close
        record.least(f"{kind} {name}, cosine", found[f"{name} cosine"], 0.9 if kind == "mixtral" else BF16_COSINE)
    record.figures[f"{kind} lower precision gradient"] = found


def middle(device: torch.device, small: bool, record: Record) -> None:
    """A model whose logits need several chunks and whose rows need several tiles of an attention kernel."""
    sizes: dict[str, Any] = {**MIDDLE, "vocab_size": 2000, "num_hidden_layers": 2} if small else MIDDLE
    lengths = [(40 + 13 * i, 20 + 37 * i) for i in range(4 if small else 9)]
    rows = trajectories(lengths, sizes["vocab_size"])
    start = time.perf_counter()
    loss, vector = plain(build("llama", sizes, torch.float64, "cpu"), rows)
    record.figure("middle model, float64 on the CPU, seconds", round(time.perf_counter() - start, 1))
    for packing in (False, True):
        name = "packed" if packing else "padded"
        model = build("llama", sizes, torch.float32, device)
        got_loss, got = engine(model, sft_batch(rows), 1500, packing)
        record.most(f"middle model {name}, float32 gradient", relative(got, vector), FLOAT32)
        record.most(f"middle model {name}, float32 loss", abs(got_loss - loss) / loss, FLOAT32)
        got_loss, got = engine(model, sft_batch(rows), 1500, packing, torch.bfloat16)
        record.least(f"middle model {name}, bfloat16 cosine", cosine(got, vector), BF16_COSINE)
        record.figures[f"middle model {name}, bfloat16"] = {
            "gradient": relative(got, vector),
            "loss": abs(got_loss - loss) / loss,
        }


def repeats(device: torch.device, small: bool, record: Record) -> None:
    """Whether the same step gives the same bits, as torch comes and with its deterministic algorithms."""
    sizes: dict[str, Any] = {**MIDDLE, "vocab_size": 2000, "num_hidden_layers": 2} if small else MIDDLE
    batch = sft_batch(trajectories([(40 + 13 * i, 20 + 37 * i) for i in range(9)], sizes["vocab_size"]))
    model = build("llama", sizes, torch.float32, device)
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        for dtype in (torch.float32, torch.bfloat16):
            for packing in (False, True):
                try:
                    found = [engine(model, batch, 1500, packing, dtype)[1] for _ in range(4)]
                    same: Any = all(torch.equal(found[0], other) for other in found[1:])
                except RuntimeError as error:
                    same = str(error).splitlines()[0]
                mode = "deterministic algorithms" if deterministic else "as torch comes"
                name = f"same bits in 4 steps, {mode}, {str(dtype)[6:]} {'packed' if packing else 'padded'}"
                record.figure(name, same)
    torch.use_deterministic_algorithms(False)

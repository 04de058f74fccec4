"""The fused output layer and objective by size of a chunk of logits: speed and memory at 152 thousand words."""

from __future__ import annotations

import gc
import importlib
import statistics
import time

import torch
from record import Record

from thence.objective import Head, Logp, Normaliser, Term, TokenInputs, objective

fused = importlib.import_module("thence.objective.fused")
WIDTH, WORDS, TOKENS = 1536, 151936, 8192
CHUNKS_MIB = (8, 32, 128, 512, 2048)


def run(device: torch.device, small: bool, record: Record) -> None:
    words, tokens = (3000, 256) if small else (WORDS, TOKENS)
    generator = torch.Generator(device).manual_seed(0)
    weight_VD = torch.randn(words, WIDTH, device=device, generator=generator).mul_(0.02)
    hidden_TD = torch.randn(tokens, WIDTH, device=device, generator=generator)
    target_T = torch.randint(words, (tokens,), device=device, generator=generator)
    before, found = fused.CHUNK_BYTES, {}
    try:
        for dtype in (torch.float32, torch.bfloat16):
            for size in CHUNKS_MIB:
                fused.CHUNK_BYTES = size * 2**20
                found[size] = one(hidden_TD, weight_VD, target_T, dtype, device, record, size)
            off = max(abs(loss - found[32]) / abs(found[32]) for loss in found.values())
            name = str(dtype)[6:]
            record.most(f"loss by size of a chunk, {name}: relative difference", off, 1e-5)
    finally:
        fused.CHUNK_BYTES = before


def one(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
    record: Record,
    size: int,
) -> float:
    """Forward and backward of one chunk size; figures of time and memory. Returns the loss."""
    terms = (Term("sft", Logp(), Normaliser("tokens")),)
    inputs = TokenInputs(target_T, torch.ones(1, len(target_T), device=device))
    hidden = hidden_TD.detach().clone().requires_grad_()
    weight = weight_VD.detach().clone().requires_grad_()
    seconds, loss = [], torch.zeros(())
    gc.collect()
    held = start_peak(device)
    for _ in range(4):
        hidden.grad = weight.grad = None
        synchronize(device)
        start = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            taken = hidden if dtype == torch.float32 else hidden.to(dtype)
            loss, _ = objective(taken, Head(weight), inputs, terms, (float(len(target_T)),))
        loss.backward()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    figures = {"ms": 1e3 * statistics.median(seconds[1:]), "tokens a chunk": max(1, size * 2**20 // (4 * len(weight)))}
    if device.type == "cuda":
        figures["peak MiB beside the weights"] = (torch.cuda.max_memory_allocated() - held) / 2**20
    record.figure(f"{str(dtype)[6:]}, chunks of {size} MiB", figures)
    return loss.item()


def start_peak(device: torch.device) -> int:
    """Measure the peak from here; what is held now."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()

"""The promises of a training step, tried on the model at hand before the first step.

A model that thence has never seen is trained only if its step's gradient is that of a plain forward and backward pass,
and if what will be written at the end can be read again. Each check takes seconds and leaves the model as it was.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thence.errors import UserError, first_line
from thence.models.layers import check_model
from thence.models.probing import largest_difference, probe_tokens, tolerance
from thence.objective import Batch, Logp, Normaliser, Row, Term, local_counts, trained_tokens
from thence.train.checkpoint import checkpoints, write_checkpoint
from thence.train.lora import adapters_off, stirred
from thence.train.model import save_model
from thence.train.policy import Policy
from thence.train.state import load_weights
from thence.train.step import StepSettings, accumulate_gradients
from thence.train.weights import whole

ROWS = ((2, 7), (3, 2), (1, 9), (4, 5))  # prompt and response tokens of the rows of the check
SPARE = 1.2  # times what is needed, in memory and on disk


class NotVerified(Exception):
    """A check that this machine has no room for. Its text says what was missing."""


def check_gradient(model: Any, packing: bool = False) -> str:
    """Make sure that every parameter gets the gradient that plain autograd gives it, row by row.

    Returns:
        What was compared, for a reader.

    Raises:
        UserError: some parameter gets another gradient.
        NotVerified: there is no memory for a second gradient.
    """
    check_model(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(iter(parameters.values())).device
    need_memory(2 * sum(p.numel() * p.element_size() for p in parameters.values()), device)
    batch = probe_batch(model)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    try:
        expected = _plain_gradient(model, batch, parameters)
    except Exception as error:  # a model's own code may raise anything
        raise UserError(
            f"{type(model).__name__} cannot be trained: {first_line(error)}",
            remedy="this architecture is not supported: please report it",
        ) from error
    try:
        optimizer = torch.optim.SGD(parameters.values(), lr=0.0)
        settings = StepSettings(micro_batch_tokens=24, packing=packing, compute_dtype=next(model.parameters()).dtype)
        accumulate_gradients(Policy(model), optimizer, batch, local_counts(batch), settings)
        whole = sum(_norm(gradient) ** 2 for gradient in expected.values()) ** 0.5
        allowed = 10 * tolerance(next(model.parameters()).dtype, device)
        for name, parameter in parameters.items():
            got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            size, off = _norm(expected[name]), _norm(got - expected[name])
            if not off <= allowed * max(size, 1e-3 * whole):
                raise UserError(
                    f"{type(model).__name__}: {name} would get a wrong gradient, off by {off / max(size, 1e-30):.1g}",
                    remedy="set packing = false" if packing else "this architecture is not supported: please report it",
                )
    finally:
        for parameter in parameters.values():
            parameter.grad = None
    moved = [name for name, value in model.named_buffers() if not torch.equal(value, buffers[name])]
    if moved:
        raise UserError(
            f"{type(model).__name__}: a forward pass changes {moved[0]}, which no gradient accounts for",
            remedy="this architecture is not supported: please report it",
        )
    return f"{len(parameters)} tensors, {len(ROWS)} rows, against plain autograd"


def check_adapters(policy: Policy, packing: bool = False) -> str:
    """The same of adapters, changed a little for the while so that none is zero; and that merging them is exact.

    Returns:
        What was compared, for a reader.

    Raises:
        UserError: an adapter gets another gradient, or the model with adapters is not the one with them merged.
        NotVerified: there is no memory for it.
    """
    model = policy.model
    with stirred(model), torch.no_grad():
        with torch.enable_grad():
            said = check_gradient(model, packing)
        token_ids = probe_tokens(model, 12)[None]
        adapted = model(input_ids=token_ids, use_cache=False).logits
        with whole(policy) as plain:
            merged = plain(input_ids=token_ids, use_cache=False).logits
        with adapters_off(model):
            without = model(input_ids=token_ids, use_cache=False).logits
    if largest_difference(merged, adapted) > 10 * tolerance(adapted.dtype, adapted.device):
        raise UserError(
            f"{type(model).__name__} reads a weight past its adapter: with adapters merged it gives other logits",
            remedy="name other layers in model.lora.targets, or train without model.lora",
            field="model.lora.targets",
        )
    if torch.equal(without, adapted):
        raise UserError(
            f"the adapters of {type(model).__name__} change nothing",
            remedy="name other layers in model.lora.targets",
            field="model.lora.targets",
        )
    return said


def check_files(model: Any, tokenizer: Any, trust_remote_code: bool = False) -> str:
    """Write the model as a finished stage would, and as a checkpoint, and read both again.

    Returns:
        What was compared, for a reader.

    Raises:
        UserError: what was written cannot be read, or is not the same.
        NotVerified: there is no memory or no room on disk for a second copy.
    """
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    need_memory(size, torch.device("cpu"))
    name = type(model).__name__
    with tempfile.TemporaryDirectory(prefix="thence-probe-") as place:
        if shutil.disk_usage(place).free < SPARE * size:
            raise NotVerified(f"{size / 1e9:.1f} GB would be written for it, and {place} has less")
        folder = Path(place) / "model"
        try:
            save_model(model, tokenizer, folder)
            opened = _opened(folder, model, trust_remote_code)
        except Exception as error:  # a model's own code and files may raise anything
            raise UserError(
                f"{name}, once saved, cannot be opened again: {first_line(error)}",
                remedy="this architecture is not supported: please report it",
            ) from error
        _same_weights(model, opened, "once saved and opened again")
        token_ids = probe_tokens(model, 12)[None]
        with torch.no_grad():
            before = model(input_ids=token_ids, use_cache=False).logits.cpu()
            after = opened(input_ids=token_ids.cpu(), use_cache=False).logits
        if largest_difference(after, before) > tolerance(before.dtype, model.device):
            raise UserError(
                f"{name}, once saved and opened again, gives other logits",
                remedy="this architecture is not supported: please report it",
            )
        shutil.rmtree(folder)
        write_checkpoint(folder, 0, model, tokenizer, {}, {"probe/step": torch.zeros(1)})
        with torch.no_grad():
            for value in opened.state_dict().values():
                value.zero_()
            load_weights(opened, checkpoints(folder)[0])
        _same_weights(model, opened, "once resumed from a checkpoint")
    return f"{size / 1e6:.1f} MB written, read and compared bit by bit"


def probe_batch(model: Any) -> Batch:
    """Four rows of different lengths and weights."""
    tokens = probe_tokens(model, sum(p + r for p, r in ROWS)).cpu().split([p + r for p, r in ROWS])
    rows = [
        Row(ids, trained_tokens(prompt, len(ids), "response"), torch.full((1, response), 1.0 + 0.5 * i), None)
        for i, (ids, (prompt, response)) in enumerate(zip(tokens, ROWS, strict=True))
    ]
    return Batch((Term("probe", Logp(), Normaliser("tokens")),), tuple(rows))


def _plain_gradient(model: Any, batch: Batch, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The same objective by the model's own logits, one row at a time."""
    device = next(model.parameters()).device
    trained = sum(row.n_trained for row in batch.rows)
    for parameter in parameters.values():
        parameter.grad = None
    for row in batch.rows:
        ids = row.token_ids.to(device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        logp = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0][row.trained[1:].to(device)]
        (-(logp * row.weights[0].to(logp)).sum() / trained).backward()
    found = {}
    for name, parameter in parameters.items():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = None
    return found


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def _opened(folder: Path, model: Any, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    dtype = next(model.parameters()).dtype
    opened = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    if model.config._attn_implementation != opened.config._attn_implementation:
        opened.set_attn_implementation(model.config._attn_implementation)
    return opened


def _same_weights(model: Any, other: Any, when: str) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    names = sorted(set(ours) ^ set(theirs))
    changed = [n for n in ours if n in theirs and not torch.equal(ours[n].cpu(), theirs[n])]
    untied = len({p.data_ptr() for p in ours.values()}) != len({p.data_ptr() for p in theirs.values()})
    if names or changed or untied:
        what = (
            f"lacks or adds {names[0]}" if names else f"has another {changed[0]}" if changed else "ties other weights"
        )
        raise UserError(
            f"{type(model).__name__}, {when}, {what}", remedy="this architecture is not supported: please report it"
        )


def need_memory(size: int, device: torch.device) -> None:
    """Raise NotVerified where so many bytes more would not fit."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _cached_memory()
        except (ValueError, OSError):  # no such answer on this system
            return
    if free < SPARE * size:
        raise NotVerified(f"{size / 1e9:.1f} GB of memory would be needed for it, {free / 1e9:.1f} GB are free")


def _cached_memory() -> int:
    """Bytes that Linux holds as file cache and would give back; 0 elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Cached:", "SReclaimable:")))

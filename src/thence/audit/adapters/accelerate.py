"""Drives training loops around ``accelerate.Accelerator``, on the probe's rows with a padding collator.

Accelerate has no trainer of its own; what users run is a loop from its documentation. Option ``loop``:

- ``counted`` (default): the loop of the gradient accumulation guide for samples of variable size. It fetches the
  batches of a window first, gathers the number of trained tokens over the ranks, and divides sums by it.
- ``documented``: the short loop, ``with accelerator.accumulate(model)`` around the model's own mean loss.

Switched off: shuffling, clipping unless the case asks for it, learning rate schedules. Cases that resume shuffle by the
DataLoader, decay the rate linearly, and follow the checkpointing guide: ``save_state``, ``load_state``,
``skip_first_batches``, ``set_epoch`` in a new Accelerator, with ``use_seedable_sampler``; option ``sampler`` "default"
leaves that out, as the guide does. Ranks talk over gloo.

Limits: accelerate has neither packing nor label smoothing; those belong to the user's data and loss.
"""

from __future__ import annotations

import contextlib
from typing import Any

from . import transformers as hf
from ._shared import RESUMED, SAVED, optimizer, schedule

STACK = "accelerate"
PACKAGES = ("accelerate", "transformers", "torch")
AXES = frozenset({"ranks", "incomplete", "epochs", "adamw", "bfloat16", "autocast", "checkpointing", "resume", "saved"})
_DOCUMENTED = {"options": {"loop": "documented"}}
CASES: tuple[dict, ...] = (
    {"name": "documented loop, micro 8 x 1", "micro_batch": 8, "accumulation": 1, **_DOCUMENTED},
    {"name": "documented loop, micro 2 x 4", "micro_batch": 2, "accumulation": 4, "quick": True, **_DOCUMENTED},
    {"name": "documented loop, 2 ranks", "micro_batch": 2, "accumulation": 2, "ranks": 2, **_DOCUMENTED},
    {"name": "documented loop, 7 examples", "micro_batch": 2, "accumulation": 4, "examples": 7, **_DOCUMENTED},
    {"name": "resume in the second epoch", "micro_batch": 2, "accumulation": 2, **RESUMED, "save_after": 4},
    {
        "name": "resume with the default sampler",
        "micro_batch": 2,
        "accumulation": 2,
        **RESUMED,
        "options": {"sampler": "default"},
    },
    {"name": "resume, 2 ranks", "micro_batch": 2, "accumulation": 1, "ranks": 2, **RESUMED},
    {"name": "what is saved, 2 ranks", "micro_batch": 2, "accumulation": 1, "ranks": 2, **SAVED},
)


def prepare() -> None:
    """Import the stack."""
    hf.quiet()
    import accelerate  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401


def run(case: dict, session: Any) -> None:
    """One case."""
    with contextlib.suppress(_Enough):
        _train(case, session, *_prepared(case, session))
    if case["beyond"] == "resume":
        session.restart()
        _resume(case, session)


class _Enough(Exception):
    """The case has had its steps."""


def _prepared(case: dict, session: Any) -> tuple[Any, ...]:
    """An accelerator, the bare model, and what ``prepare`` makes of model, optimizer, data and schedule."""
    from accelerate import Accelerator, DataLoaderConfiguration, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import set_seed
    from torch.utils.data import DataLoader

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=case["accumulation"],
        mixed_precision="bf16" if case["precision"] == "autocast" else "no",
        step_scheduler_with_optimizer=False,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=case["options"].get("sampler") != "default"),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if session.ranks > 1 else None,
    )
    bare = hf.load_model(case, session).train()
    if case["checkpointing"]:
        bare.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if case["beyond"] == "resume":
        set_seed(0)
    data = DataLoader(
        session.rows(),  # pyright: ignore
        batch_size=case["micro_batch"],
        collate_fn=hf.padding_collator(bare.config.pad_token_id),
        shuffle=case["beyond"] == "resume",
    )
    steps = optimizer(case, bare.parameters())
    prepared = accelerator.prepare(bare, steps, data, schedule(case, steps))
    session.watch(bare)
    return accelerator, bare, *prepared


def _train(case, session, accelerator, bare, model, optimizer, data, rates) -> None:
    session.parameters(bare)
    loops = {"counted": _counted_epoch, "documented": _documented_epoch}
    loop = loops[case["options"].get("loop", "counted")]

    def stepped() -> None:
        rates.step()
        if case["save_after"] == session.record["steps"] + 1:
            accelerator.save_state(_folder(session))
        if session.stepped(bare):
            if case["beyond"] == "saved":
                accelerator.save_model(model, _folder(session))
                if session.rank == 0:
                    session.saved(_folder(session))
            raise _Enough

    for epoch in range(case["epochs"]):
        if case["beyond"] == "resume" and hasattr(data, "set_epoch"):
            data.set_epoch(epoch)
        loop(case, stepped, accelerator, model, optimizer, data)


def _resume(case, session) -> None:
    """The guide's way: ``load_state``, then ``skip_first_batches`` in the epoch that was left."""
    accelerator, bare, model, optimizer, data, rates = _prepared(case, session)
    accelerator.load_state(_folder(session))
    session.parameters(bare)
    done = case["save_after"] * case["accumulation"]
    first, skipped = divmod(done, len(data))

    def stepped() -> None:
        rates.step()
        if session.stepped(bare):
            session.stop()

    for epoch in range(first, case["epochs"]):
        if hasattr(data, "set_epoch"):
            data.set_epoch(epoch)
        left = accelerator.skip_first_batches(data, skipped) if epoch == first and skipped else data
        _counted_epoch(case, stepped, accelerator, model, optimizer, left)


def _folder(session: Any) -> str:
    """One folder for all ranks."""
    from pathlib import Path

    return str(Path(session.scratch).with_name("scratch-0") / "checkpoint")


def _documented_epoch(case, stepped, accelerator, model, optimizer, data) -> None:
    for batch in data:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients and case["clip"]:
                accelerator.clip_grad_norm_(model.parameters(), case["clip"])
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            stepped()


def _counted_epoch(case, stepped, accelerator, model, optimizer, data) -> None:
    import torch

    batches = iter(data)
    left = len(data)
    while left:
        window = [next(batches) for _ in range(min(case["accumulation"], left))]
        left -= len(window)
        own = torch.stack([batch["labels"][:, 1:].ne(-100).sum() for batch in window]).sum()
        trained = int(accelerator.gather(own).sum())
        for index, batch in enumerate(window):
            last = index == len(window) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                # DDP averages over ranks, and backward divides by the accumulation steps: undo both.
                factor = accelerator.num_processes * accelerator.gradient_accumulation_steps
                accelerator.backward(_loss_sum(model, batch) * factor / trained)
        if case["clip"]:
            accelerator.clip_grad_norm_(model.parameters(), case["clip"])
        optimizer.step()
        optimizer.zero_grad()
        stepped()


def _loss_sum(model: Any, batch: dict[str, Any]):
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")

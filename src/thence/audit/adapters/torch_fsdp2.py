"""A plain PyTorch loop around FSDP2, as the tutorial of ``fully_shard`` writes it; one process a rank, gloo.

Every decoder layer is cut, then the whole model; ``loss.backward()``, ``torch.nn.utils.clip_grad_norm_``,
``optimizer.step()``. With one rank the mesh has one rank. FSDP2 averages gradients over ranks unless it is told not to,
so what a loop trains depends on what its loss is divided by. Options:

- ``loss``: ``counted`` (default) divides sums by the trained tokens of all micro-batches and all ranks; ``own`` by
  those of the rank's own micro-batches; ``documented`` backpropagates the model's own mean loss of a micro-batch,
  divided by the accumulation, as tutorials do.
- ``divisor``: on which FSDP modules ``set_gradient_divide_factor(1.0)`` is called, so that gradients are added up and
  not averaged: ``all`` (default where the loss is counted), ``root`` (the setter does not reach the layers), ``none``
  (default where it is not). Gloo also wants ``set_force_sum_reduction_for_comms(True)``, or refuses a factor; NCCL does
  without.
- ``clip_by``: ``torch`` (default) clips by the norm of the whole gradient, from sharded parameters; ``shard`` by the
  norm of the local shards, which is what loops do that take ``to_local()`` or ``grad._local_tensor`` and forget to sum.
- ``sync``: ``every`` (default) reduces in every backward pass, ``last`` only in the last
  (``set_requires_gradient_sync``).
- ``replicas``: groups of ranks that each hold a whole copy (HSDP).
- ``offload``: ``CPUOffloadPolicy``. On a CPU it moves nothing, so those cases say nothing of copies to and from a GPU.

Cases that resume save by torch.distributed.checkpoint and load into a new model, optimizer and schedule; the position
in the data is the loop's own, so those cases say nothing of it. What is saved is the whole state gathered by
``get_model_state_dict``.

Weights in float32 or bfloat16; arithmetic as the weights, or in bfloat16 by ``MixedPrecisionPolicy``. There is no
shuffling and no schedule, and rows are padded; micro-batches are dealt to the ranks in turn. Where a rank has fewer
micro-batches than another it makes passes with weight zero, since ranks gather weights together; the other two losses
have no such passes, and their incomplete windows are left out. The loop is this file's own: what is audited is what
FSDP2 and the optimizer make of it.
"""

from __future__ import annotations

from typing import Any

from . import transformers as hf
from ._shared import RESUMED, SAVED, join_alone, optimizer, schedule

STACK = "torch"
PACKAGES = ("torch",)
"""transformers gives the model alone: its public reports would have nothing to do with what is found here."""
AXES = frozenset({"ranks", "incomplete", "epochs", "adamw", "bfloat16", "autocast", "checkpointing", "resume", "saved"})


def _case(name: str, ranks: int = 2, micro: int = 2, accumulation: int = 2, **fields: Any) -> dict:
    options = {
        key: fields.pop(key) for key in ("loss", "divisor", "clip_by", "sync", "replicas", "offload") if key in fields
    }
    return {
        "name": name, "micro_batch": micro, "accumulation": accumulation, "ranks": ranks, "options": options, **fields,
    }  # fmt: skip


CLIP = 0.5
CASES: tuple[dict, ...] = (
    _case("4 ranks, micro 2 x 1", 4, 2, 1),
    _case("2 replicas of 2 ranks, micro 2 x 1", 4, 2, 1, replicas=2),
    _case("summed in the last pass only, 2 ranks", sync="last"),
    _case("checkpointing, 2 ranks", checkpointing=True),
    _case("bfloat16, 2 ranks", precision="autocast"),
    _case("AdamW, 2 ranks", optimizer="adamw", lr=1e4),
    _case("clipped by the whole norm, 2 ranks", clip=CLIP),
    _case("CPUOffloadPolicy, 2 ranks", offload=True),
    _case("all tokens, then averaged, 2 ranks", micro=1, accumulation=4, divisor="none", quick=True),
    _case("all tokens, then averaged, 4 ranks", 4, 2, 1, divisor="none"),
    _case("divisor set on the root module only, 2 ranks", 2, 4, 1, divisor="root"),
    _case("divided by the rank's tokens, 2 ranks", loss="own"),
    _case("divided by the rank's tokens, 4 ranks", 4, 1, 2, loss="own"),
    _case("documented loop, 1 rank, micro 8 x 1", 1, 8, 1, loss="documented"),
    _case("documented loop, 1 rank, micro 2 x 4", 1, 2, 4, loss="documented"),
    _case("documented loop, 2 ranks, micro 4 x 1", 2, 4, 1, loss="documented", quick=True),
    _case("documented loop, 4 ranks, micro 2 x 1", 4, 2, 1, loss="documented"),
    _case("documented loop, 2 ranks, micro 2 x 2", loss="documented"),
    _case("clipped by the norm of the shard, 2 ranks", clip=CLIP, clip_by="shard", quick=True),
    _case("clipped by the norm of the shard, 4 ranks", 4, 2, 1, clip=CLIP, clip_by="shard"),
    _case("resume, 2 ranks", accumulation=1, **RESUMED),
    _case("what is saved, 2 ranks", accumulation=1, **SAVED),
)


def prepare() -> None:
    """Import torch and transformers, and join the ranks."""
    hf.quiet()
    join_alone()
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    dist.init_process_group("gloo")


def run(case: dict, session: Any) -> None:
    """One case."""
    model = hf.load_model(case, session).train()
    if case["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    options = {"loss": "counted", "clip_by": "torch", "sync": "every", **case["options"]}
    options.setdefault("divisor", "all" if options["loss"] == "counted" else "none")
    windows = _windows(case, session.rows())
    if options["loss"] != "counted" and any(len(turn) < case["ranks"] for window in windows for turn in window):
        session.skip("this loop has no passes for a rank without rows, and the others would wait for it")
    shard(model, case, options)
    steps = optimizer(case, model.parameters())
    rates = schedule(case, steps)
    session.parameters(_whole(model))
    for number, window in enumerate(windows, start=1):
        train_window(model, steps, window, case, options, session)
        rates.step()
        if case["save_after"] == number:
            save(model, steps, rates, session)
        if session.stepped(_whole(model)):
            break
    if case["beyond"] == "saved":
        session.saved(save_whole(model, session))
    if case["beyond"] == "resume":
        resume(case, session, windows, options)


def save(model: Any, steps: Any, rates: Any, session: Any) -> None:
    """Write a checkpoint as the tutorial of torch.distributed.checkpoint does: every rank its shards."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save as save_shards

    weights, moments = get_state_dict(model, steps)
    save_shards({"model": weights, "optimizer": moments, "rates": rates.state_dict()}, checkpoint_id=_folder(session))


def save_whole(model: Any, session: Any) -> str:
    """Write the whole model, gathered, by the first rank; returns the folder."""
    from pathlib import Path

    import torch.distributed as dist
    from safetensors.torch import save_file
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    folder = _folder(session)
    Path(folder).mkdir(exist_ok=True)
    if session.rank == 0:
        save_file(whole, f"{folder}/model.safetensors")  # pyright: ignore
    dist.barrier()
    return folder


def resume(case: dict, session: Any, windows: list, options: dict) -> None:
    """Build everything anew, load the checkpoint, and train the windows that are left."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load as load_shards

    session.restart()
    session.say(own_position=True)
    model = hf.load_model(case, session).train()
    shard(model, case, options)
    steps = optimizer(case, model.parameters())
    rates = schedule(case, steps)
    weights, moments = get_state_dict(model, steps)
    found = {"model": weights, "optimizer": moments, "rates": rates.state_dict()}
    load_shards(found, checkpoint_id=_folder(session))
    set_state_dict(model, steps, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    rates.load_state_dict(found["rates"])
    session.parameters(_whole(model))
    for window in windows[case["save_after"] :]:
        train_window(model, steps, window, case, options, session)
        rates.step()
        if session.stepped(_whole(model)):
            break


def _folder(session: Any) -> str:
    """One folder for all ranks."""
    from pathlib import Path

    return str(Path(session.scratch).with_name("scratch-0") / "checkpoint")


def shard(model: Any, case: dict, options: dict) -> None:
    """Cut the model in place: layer by layer, then what is left."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    ranks, replicas = case["ranks"], options.get("replicas", 1)
    sizes, names = ((ranks,), ("shard",)) if replicas == 1 else ((replicas, ranks // replicas), ("replicate", "shard"))
    how: dict[str, Any] = {
        "mesh": init_device_mesh("cpu", sizes, mesh_dim_names=names),
        "offload_policy": CPUOffloadPolicy(pin_memory=False) if options.get("offload") else OffloadPolicy(),
    }
    if case["precision"] == "autocast":
        how["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.base_model.layers:
        fully_shard(layer, **how)
    fully_shard(model, **how)
    summing = {"all": [m for m in model.modules() if isinstance(m, FSDPModule)], "root": [model], "none": []}
    for module in summing[options["divisor"]]:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def train_window(model: Any, steps: Any, window: list, case: dict, options: dict, session: Any) -> None:
    """The backward passes of one optimizer step, clipping, and the step."""
    import torch

    for number, turn in enumerate(window, start=1):
        if options["sync"] == "last":
            model.set_requires_gradient_sync(number == len(window))
        if session.rank >= len(turn):
            _loss_sum(model, hf.padding_collator(0)(turn[0])).mul(0.0).backward()  # ranks gather weights together
            continue
        batch = hf.padding_collator(0)(turn[session.rank])
        session.forward(batch["input_ids"], batch["attention_mask"])
        if options["loss"] == "documented":
            (model(**batch).loss / len(window)).backward()
        else:
            (_loss_sum(model, batch) / _trained(window, options["loss"], session.rank)).backward()
    if case["clip"] and options["clip_by"] == "torch":
        torch.nn.utils.clip_grad_norm_(model.parameters(), case["clip"])
    elif case["clip"]:
        torch.nn.utils.clip_grad_norm_(_shards(model), case["clip"])
    steps.step()
    steps.zero_grad()


def _shards(model: Any) -> list:
    """This rank's part of every parameter, as a plain parameter with its part of the gradient."""
    import torch

    found = []
    for parameter in model.parameters():
        part = torch.nn.Parameter(parameter.to_local().detach())
        part.grad = parameter.grad.to_local()
        found.append(part)
    return found


def _windows(case: dict, rows: list) -> list:
    """Windows in the order of the data, each a list over the accumulation of lists over the ranks of micro-batches."""
    size, ranks, accumulation = case["micro_batch"], case["ranks"], case["accumulation"]
    found = []
    for _ in range(case["epochs"]):
        batches = [rows[at : at + size] for at in range(0, len(rows), size)]
        turns = [batches[at : at + ranks] for at in range(0, len(batches), ranks)]
        found += [turns[at : at + accumulation] for at in range(0, len(turns), accumulation)]
    return found


def _trained(window: list, loss: str, rank: int) -> int:
    """Trained tokens of the window: of all ranks, or of this rank's own micro-batches."""
    batches = [rows for turn in window for rows in (turn if loss == "counted" else turn[rank : rank + 1])]
    return sum(label != -100 for rows in batches for row in rows for label in row["labels"][1:])


def _loss_sum(model: Any, batch: dict):
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return cross_entropy(logits[:, :-1].float().flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")


def _whole(model: Any) -> list:
    """Names and whole tensors; all ranks gather together."""
    return [(name, parameter.detach().full_tensor()) for name, parameter in model.named_parameters()]

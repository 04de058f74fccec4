"""DeepSpeed's engine under a plain training loop of our own: what reaches the optimizer of every loss handed to it.

Rows are fed in order as padded micro-batches, dealt to the ranks in turn. Every micro-batch's loss is its share of the
token mean over the whole window of all ranks, times accumulation and ranks, because the engine divides by the one and
averages over the other: an engine that does so gives the token mean exactly. A data set that is not a whole number
of windows is left out: the engine knows of no epoch, so what happened at its end would be this loop's doing.

Options: ``stage`` 0 to 3; ``offload`` "none" or "cpu" (the optimizer's state and step); ``accumulation_by`` "config"
(``gradient_accumulation_steps``), "hand" (1 in the configuration, several backward calls, the boundary set by
``set_gradient_accumulation_boundary``, as accelerate does) or "never" (the same, and no boundary set); ``loss``
"summed" (as above) or "model" (the mean that the model returns, so that the engine takes a mean of micro-batch means);
``grad_accum_dtype`` "fp32", "bf16" or "" (the engine's choice); ``saved_by`` "zero_to_fp32" (a checkpoint, and its
weights collected by ``get_fp32_state_dict_from_zero_checkpoint``) or "16bit" (``save_16bit_model``).

Cases that resume write ``save_checkpoint`` and load it into a new model, optimizer, schedule and engine. The engine
holds no position in the data, so those cases say nothing of it. What ``save_16bit_model`` writes of float32 weights is
float32; of bfloat16 weights it is the rounded copy that the engine computes with, and the case asks for that.

The optimizer is torch's SGD or AdamW given to the engine, so no extension is compiled. There is no schedule but in
cases that resume, and no shuffling; clipping is as the case says (its default differs between versions). Everything
runs on the CPU accelerator with gloo. Not covered: DeepSpeed's own CPU Adam, offloaded parameters (ZeRO 3), its data
loader.
"""

# pyright: reportMissingImports=false

import contextlib
import os
import sys

from ._shared import RESUMED, SAVED, join_alone, optimizer, schedule
from .transformers import padding_collator

STACK = "deepspeed"
PACKAGES = ("deepspeed", "transformers", "torch")
AXES = frozenset({"ranks", "adamw", "bfloat16", "epochs", "checkpointing", "resume", "saved"})

DEFAULTS = {
    "stage": 2, "offload": "cpu", "accumulation_by": "config", "loss": "summed", "grad_accum_dtype": "",
    "saved_by": "zero_to_fp32",
}  # fmt: skip
"""What the common cases run with: ZeRO 2 with the optimizer on the CPU is what most people set who offload at all."""


def _case(name, stage=2, offload="cpu", by="config", also=(), **fields):
    options = {"stage": stage, "offload": offload, "accumulation_by": by, **dict(also)}
    return {"name": name, "options": options, **fields}


def _never_set(name, stage, offload="cpu"):
    """One micro-batch in the configuration, four backward calls and no boundary set: a plain torch loop.

    The engine takes every backward for the last one of a step, so nobody should do this; an engine that throws
    gradients away or carries them into the next step does not say so.
    """
    name = f"{name}, boundary never set, two steps, micro 1 x 4"
    return _case(name, stage, offload, "never", micro_batch=1, steps=2, lr=0.1, extra=True)


def _models_loss(name, stage, offload="cpu", **fields):
    """The loss that the model returns, as tutorials hand it over; the engine takes the mean of what it is given."""
    return _case(name, stage, offload, also={"loss": "model"}, asked="micro-batch-mean", **fields)


def _summed_in(name, stage, offload="cpu", dtype="fp32", **fields):
    """Weights in bfloat16, gradients added up in ``dtype``."""
    return _case(name, stage, offload, also={"grad_accum_dtype": dtype}, precision="bfloat16", **fields)


def _resumed(name, stage, offload="none", ranks=1, **fields):
    """A checkpoint in the middle of an epoch; windows of four rows."""
    return _case(name, stage, offload, micro_batch=2, accumulation=2 // ranks, ranks=ranks, **RESUMED, **fields)


def _saved(name, stage, offload="none", by="zero_to_fp32", ranks=1, **fields):
    """What is left on the disk after the last step."""
    also = {"saved_by": by}
    return _case(
        name, stage, offload, also=also, micro_batch=2, accumulation=2 // ranks, ranks=ranks, **SAVED, **fields
    )


CASES = (
    _case("ZeRO 0, micro 2 x 4", 0, "none"),
    _case("ZeRO 1, micro 2 x 4", 1, "none"),
    _case("ZeRO 2, micro 2 x 4", 2, "none", quick=True),
    _case("ZeRO 3, micro 2 x 4", 3, "none"),
    _case("ZeRO 1, offload cpu, micro 2 x 4", 1),
    _case("ZeRO 2, offload cpu, micro 2 x 4"),
    _case("ZeRO 3, offload cpu, micro 2 x 4", 3),
    _case("ZeRO 2, offload cpu, micro 2 x 3", accumulation=3, examples=6),
    _case("ZeRO 2, offload cpu, 12 examples, micro 2 x 6", accumulation=6, examples=12),
    _case("ZeRO 2, boundary by hand, micro 2 x 4", 2, "none", "hand"),
    _case("ZeRO 2, offload cpu, boundary by hand, micro 2 x 4", 2, "cpu", "hand", quick=True),
    _case("ZeRO 1, offload cpu, boundary by hand, micro 2 x 4", 1, "cpu", "hand"),
    _case("ZeRO 1, offload cpu, micro 1 x 4, 2 ranks", 1, micro_batch=1, ranks=2),
    _case("ZeRO 2, micro 1 x 4, 2 ranks", 2, "none", micro_batch=1, ranks=2),
    _case("ZeRO 3, offload cpu, micro 1 x 4, 2 ranks", 3, micro_batch=1, ranks=2),
    _case("ZeRO 2, offload cpu, three steps, micro 1 x 4", micro_batch=1, epochs=2, steps=3, lr=0.1),
    _case("ZeRO 3, three steps, micro 1 x 4", 3, "none", micro_batch=1, epochs=2, steps=3, lr=0.1),
    _case("ZeRO 2, offload cpu, bfloat16, three steps, micro 1 x 4", micro_batch=1, epochs=2, steps=3, lr=0.1,
          precision="bfloat16"),
    _never_set("ZeRO 0", 0, "none"),
    _never_set("ZeRO 1", 1, "none"),
    _never_set("ZeRO 2", 2, "none"),
    _never_set("ZeRO 3", 3, "none"),
    _never_set("ZeRO 1, offload cpu", 1),
    _never_set("ZeRO 2, offload cpu", 2),
    _never_set("ZeRO 3, offload cpu", 3),
    _models_loss("ZeRO 0, the model's own loss, micro 2 x 4", 0, "none"),
    _models_loss("ZeRO 2, the model's own loss, micro 2 x 4", 2, "none", quick=True),
    _models_loss("ZeRO 2, offload cpu, the model's own loss, micro 2 x 4", 2),
    _models_loss("ZeRO 3, the model's own loss, micro 2 x 4", 3, "none"),
    _models_loss("ZeRO 2, the model's own loss, micro 4 x 1, 2 ranks", 2, "none", micro_batch=4, accumulation=1,
                 ranks=2),
    _summed_in("ZeRO 0, bfloat16, grad_accum_dtype bf16, micro 2 x 4", 0, "none", "bf16"),
    _summed_in("ZeRO 1, bfloat16, grad_accum_dtype fp32, micro 2 x 4", 1, "none"),
    _summed_in("ZeRO 2, bfloat16, grad_accum_dtype fp32, micro 2 x 4", 2, "none"),
    _summed_in("ZeRO 2, offload cpu, bfloat16, grad_accum_dtype fp32, micro 2 x 4", 2),
    _summed_in("ZeRO 2, offload cpu, bfloat16, grad_accum_dtype bf16, micro 2 x 4", 2, "cpu", "bf16"),
    _summed_in("ZeRO 1, bfloat16, grad_accum_dtype fp32, micro 1 x 4, 2 ranks", 1, "none", micro_batch=1, ranks=2),
    _summed_in("ZeRO 2, bfloat16, grad_accum_dtype fp32, micro 1 x 4, 2 ranks", 2, "none", micro_batch=1, ranks=2),
    _resumed("ZeRO 0, resume", 0),
    _resumed("ZeRO 1, resume, 2 ranks", 1, ranks=2),
    _resumed("ZeRO 2, resume, 2 ranks", 2, ranks=2),
    _resumed("ZeRO 2, offload cpu, resume", 2, "cpu"),
    _resumed("ZeRO 3, resume, 2 ranks", 3, ranks=2),
    _resumed("ZeRO 3, offload cpu, resume", 3, "cpu"),
    _saved("ZeRO 0, save_16bit_model", 0, by="16bit"),
    _saved("ZeRO 1, what is saved, 2 ranks", 1, ranks=2),
    _saved("ZeRO 2, what is saved, 2 ranks", 2, ranks=2),
    _saved("ZeRO 2, offload cpu, what is saved", 2, "cpu"),
    _saved("ZeRO 3, what is saved, 2 ranks", 3, ranks=2),
    _saved("ZeRO 2, bfloat16, what is saved", 2, precision="bfloat16"),
    _saved("ZeRO 2, bfloat16, save_16bit_model", 2, by="16bit", precision="bfloat16"),
)  # fmt: skip


def prepare() -> None:
    """Import the stack on its CPU accelerator and join the ranks."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    join_alone()
    from transformers import AutoConfig, AutoModelForCausalLM

    # Both look modules up late; resolving them here keeps their import out of the first case.
    AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model("llama"))]
    with contextlib.suppress(ImportError):
        pass

    start()


def start() -> None:
    """Join the ranks under gloo, with what does not work on a CPU replaced."""
    import deepspeed

    # A compiled operator for inference on CPUs that training does not use; building it takes minutes.
    vars(sys.modules["deepspeed.comm.torch"])["build_shm_op"] = lambda: None
    # 0.18.7 to 0.18.9 ask for the free memory before they reduce a bucket; on a CPU the answer leads them to a view
    # of a split tensor that autograd refuses to have changed in place. Without free memory they take the plain way.
    numbers = tuple(int(part) for part in deepspeed.__version__.split("+")[0].split(".")[:3] if part.isdigit())
    if (0, 18, 7) <= numbers < (0, 19):
        from deepspeed.accelerator import get_accelerator

        get_accelerator().available_memory = lambda *_: 0
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def run(case, session) -> None:
    """Train the probe under the engine."""

    rows = session.rows()
    if len(rows) % (case["micro_batch"] * case["accumulation"] * case["ranks"]):
        session.skip("the engine knows of no end of the data: a window that is not full is the loop's affair")
    engine, options = _engine(case, session), case["options"]
    session.say(lr=case["lr"], note=f"ZeRO stage {options['stage']}, optimizer offload: {options['offload']}")
    windows = _windows(case, rows)
    try:
        session.parameters(_full_parameters(engine, options["stage"]))
        for number, window in enumerate(windows, start=1):
            _train_window(engine, window, session, options)
            if case["save_after"] == number:
                engine.save_checkpoint(_folder(session), tag="step")
            if session.stepped(_full_parameters(engine, options["stage"])):
                break
        if case["beyond"] == "saved":
            _save(engine, session, options)
    finally:
        engine.destroy()
    if case["beyond"] == "resume":
        _resume(case, session, windows[case["save_after"] :])


def _engine(case, session):
    """A new model, optimizer and engine; a schedule where the case has one, which the engine steps."""
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM

    options = case["options"]
    model = AutoModelForCausalLM.from_pretrained(session.model, torch_dtype=torch.float32)
    model.train()
    if case["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    by_hand = options["accumulation_by"] != "config"
    steps = optimizer(case, model.parameters())
    rates = schedule(case, steps) if case["schedule"] == "linear" else None
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=steps, lr_scheduler=rates, config=_config(case, options, by_hand)
    )
    session.watch(engine.module)
    return engine


def _save(engine, session, options) -> None:
    """Save as the option says, and hand over what a user would open."""
    folder = _folder(session)
    if options["saved_by"] == "16bit":
        session.say(saved_dtype="bfloat16" if engine.bfloat16_enabled() else "float32")
        if not engine.save_16bit_model(folder, "model.pt"):
            session.skip("save_16bit_model saved nothing: stage3_gather_16bit_weights_on_model_save is off")
        if session.rank == 0:
            session.saved(f"{folder}/model.pt")
        return
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    engine.save_checkpoint(folder, tag="step")
    if session.rank == 0:
        session.saved(get_fp32_state_dict_from_zero_checkpoint(folder, tag="step"))


def _resume(case, session, windows) -> None:
    """Build everything anew, load the checkpoint, and train the windows that are left."""
    session.restart()
    session.say(own_position=True)
    engine, stage = _engine(case, session), case["options"]["stage"]
    try:
        engine.load_checkpoint(_folder(session), tag="step")
        session.parameters(_full_parameters(engine, stage))
        for window in windows:
            _train_window(engine, window, session, case["options"])
            if session.stepped(_full_parameters(engine, stage)):
                break
    finally:
        engine.destroy()


def _folder(session) -> str:
    """One folder for all ranks."""
    from pathlib import Path

    return str(Path(session.scratch).with_name("scratch-0") / "checkpoint")


def _config(case, options, by_hand) -> dict:
    """The JSON configuration that people write, with the buckets cut down to the probe's size."""
    zero = {"stage": options["stage"], "reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}
    if options["offload"] == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if options["stage"] == 3:
        # The default would leave the probe's small parameters unsharded.
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 100_000}
    accumulation = 1 if by_hand else case["accumulation"]
    types = {"data_types": {"grad_accum_dtype": options["grad_accum_dtype"]}} if options["grad_accum_dtype"] else {}
    return {
        **types,
        "train_micro_batch_size_per_gpu": case["micro_batch"],
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": case["micro_batch"] * accumulation * case["ranks"],
        "gradient_clipping": case["clip"],
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": case["precision"] == "bfloat16"},
        "steps_per_print": 10**9,
    }


def _windows(case, rows):
    """Windows in the order of the data, each a list over the accumulation of lists over the ranks of micro-batches."""
    stream = [row for _ in range(case["epochs"]) for row in rows]
    size, ranks, accumulation = case["micro_batch"], case["ranks"], case["accumulation"]
    batches = [stream[at : at + size] for at in range(0, len(stream), size)]
    turns = [batches[at : at + ranks] for at in range(0, len(batches), ranks)]
    return [turns[at : at + accumulation] for at in range(0, len(turns), accumulation)]


def _train_window(engine, window, session, options) -> None:
    """The backward passes of one optimizer step, and the step."""
    by = options["accumulation_by"]
    trained = sum(label != -100 for turn in window for batch in turn for row in batch for label in row["labels"][1:])
    # By hand the engine knows of one micro-batch and divides by nothing.
    scale = session.ranks * (len(window) if by == "config" else 1) / trained
    for number, turn in enumerate(window, start=1):
        last = number == len(window)
        if by == "hand":
            engine.set_gradient_accumulation_boundary(is_boundary=last)
        if options["loss"] == "model":
            engine.backward(_own_loss(engine, turn[session.rank]) / (1 if by == "config" else len(window)))
        else:
            engine.backward(_summed_loss(engine, turn[session.rank]) * scale)
        if last or by == "config":
            engine.step()


def _own_loss(engine, rows):
    """The loss that a Hugging Face model returns by itself: the mean over the trained tokens of its micro-batch."""
    return engine(**padding_collator(0)(rows), use_cache=False).loss


def _summed_loss(engine, rows):
    """Negative log-likelihood of the trained tokens of a padded micro-batch, nats, summed."""
    import torch

    batch = padding_collator(0)(rows)
    labels_BT = batch.pop("labels")
    logits_BTV = engine(**batch, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].float().flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def _full_parameters(engine, stage):
    """Names and whole tensors: the float32 master weights where the engine keeps them, as they are not rounded."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    pairs = []
    for name, parameter in engine.module.named_parameters():
        master = safe_get_full_fp32_param(parameter) if stage > 0 else None
        if master is None:
            with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                master = parameter.detach().clone()
        pairs.append((name, master.detach().clone()))
    return pairs

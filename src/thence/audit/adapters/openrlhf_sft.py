"""OpenRLHF's supervised training: its own program ``openrlhf.cli.train_sft`` with its data set, Actor, loop, loss and
DeepSpeed strategy, started in this process with the flags that a user would give.

Rows are fed as messages in a JSON Lines file through ``--input_key messages --apply_chat_template``. What is changed
so that it runs on a CPU and in a known order: flash-attn is replaced by a stand-in with its unpadding functions (the
attention is torch's eager one), the device mesh is made of CPUs, calls that choose a CUDA device do nothing, the
sampler does not shuffle, the data set is tokenized in this process, and the optimizer (FusedAdam) becomes torch's SGD
or AdamW given to the engine. The learning rate is constant, without warm-up. ``--packing_samples`` takes the padding
out of a micro-batch and lays its rows end to end.

Options: ``stage`` 0, 1 or 2 (OpenRLHF's default). No optimizer offload, so that a fault of DeepSpeed's offload is not
taken for one of OpenRLHF's: audit that with the adapter ``deepspeed``. Not covered: ZeRO 3, ring attention, LoRA.
"""

# pyright: reportMissingImports=false

import importlib.machinery
import os
import runpy
import sys
import types
from typing import Any

from ._shared import join_alone, optimizer
from .deepspeed import start

STACK = "openrlhf"
PACKAGES = ("openrlhf", "deepspeed", "transformers", "torch")
AXES = frozenset({"ranks", "incomplete", "epochs", "adamw", "bfloat16", "packing", "checkpointing"})

DEFAULTS = {"stage": 2, "offload": "none", "accumulation_by": "config"}
"""Engine settings that the adapter always has, so that known reports of DeepSpeed match the right ones."""

CASES = (
    {"name": "ZeRO 0, micro 2 x 4", "options": {"stage": 0}},
    {"name": "ZeRO 1, micro 1 x 4, 2 ranks", "micro_batch": 1, "ranks": 2, "options": {"stage": 1}},
    {"name": "packing, micro 2 x 4", "packing": True, "quick": True},
    {"name": "packing, micro 1 x 4, 2 ranks", "micro_batch": 1, "ranks": 2, "packing": True},
)


class _Current:
    """The case that runs now, for the replaced functions."""

    session: Any = None
    engine: Any = None


def prepare() -> None:
    """Import OpenRLHF as it is without a GPU, and replace what needs one."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    join_alone()
    import deepspeed  # noqa: F401
    import transformers  # noqa: F401

    _stand_in_for_flash_attn()
    _without_cuda()
    import openrlhf.cli.train_sft  # noqa: F401

    start()
    _replace_in_openrlhf()


def run(case, session) -> None:
    """Start the program; it ends when the case has had its steps, or with the data."""
    import datasets

    if case["options"]["stage"] not in (0, 1, 2):
        session.skip("ZeRO 3 is not driven by this adapter")
    datasets.disable_progress_bars()
    _Current.session = session
    before = sys.argv
    sys.argv = ["train_sft", *_flags(case, session)]
    try:
        runpy.run_module("openrlhf.cli.train_sft", run_name="__main__", alter_sys=False)
    except ValueError as error:
        # Both wordings of its refusal to train on less than one window.
        if "num_update_steps_per_epoch" not in str(error):
            raise
        session.skip(f"OpenRLHF refuses to train on so few rows: {error}")
    finally:
        sys.argv = before
        if _Current.engine is not None:
            _Current.engine.destroy()
        _Current.session = _Current.engine = None


def _flags(case, session) -> list[str]:
    """The command line: named with dots since 0.10.x, where `openrlhf.utils.config` came, and without before."""
    import importlib.util

    lr, clip = str(case["lr"]), str(case["clip"])
    window = str(case["micro_batch"] * case["accumulation"] * case["ranks"])
    stage = str(case["options"]["stage"])
    # Names before and since, and the value; None: a switch.
    table = [
        ("pretrain", "model.model_name_or_path", session.model),
        ("save_path", "ckpt.output_dir", session.scratch),
        ("ckpt_path", "ckpt.path", f"{session.scratch}/checkpoints"),
        ("dataset", "data.dataset", session.data("messages")),
        ("input_key", "data.input_key", "messages"),
        ("apply_chat_template", "data.apply_chat_template", None),
        ("max_len", "data.max_len", "512"),
        ("micro_train_batch_size", "train.micro_batch_size", str(case["micro_batch"])),
        ("train_batch_size", "train.batch_size", window),
        ("max_epochs", "train.max_epochs", str(case["epochs"])),
        ("zero_stage", "ds.zero_stage", stage),
        ("learning_rate", "adam.lr", lr),
        ("lr_scheduler", "lr_scheduler", "constant"),
        ("lr_warmup_ratio", "lr_warmup_ratio", "0"),
        ("max_norm", "max_norm", clip),
        ("attn_implementation", "ds.attn_implementation", "eager"),
        ("eval_steps", "eval.steps", "1000000"),
    ]
    if case["packing"]:
        table.append(("packing_samples", "ds.packing_samples", None))
    if case["checkpointing"]:
        table.append(("gradient_checkpointing", "model.gradient_checkpointing_enable", None))
    dotted = importlib.util.find_spec("openrlhf.utils.config") is not None
    flags = []
    for old, new, value in table:
        flags += [f"--{new if dotted else old}", *([] if value is None else [value])]
    return flags


def _stand_in_for_flash_attn() -> None:
    """Modules of flash-attn's names with the functions that OpenRLHF takes from it to lay rows end to end."""
    import torch
    from einops import rearrange

    def index_first_axis(values, indices):
        return values[indices]

    def unpad_input(values, mask):
        lengths = mask.sum(-1, dtype=torch.int32)
        indices = mask.flatten().nonzero().flatten()
        edges = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return values.flatten(0, 1)[indices], indices, edges, int(lengths.max()), lengths

    def pad_input(values, indices, batch, length):
        full = values.new_zeros(batch * length, *values.shape[1:])
        return full.index_put((indices,), values).unflatten(0, (batch, length))

    def all_gather(*_):
        raise NotImplementedError("ring attention is not driven by this adapter")

    functions = {
        "flash_attn": {},
        "flash_attn.utils": {},
        "flash_attn.bert_padding": dict(
            index_first_axis=index_first_axis, unpad_input=unpad_input, pad_input=pad_input, rearrange=rearrange
        ),
        "flash_attn.utils.distributed": {"all_gather": all_gather},
    }
    for name, content in functions.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        module.__dict__.update(content)
        sys.modules[name] = module


def _without_cuda() -> None:
    """Make the calls that choose a CUDA device do nothing."""
    import torch

    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(torch.cuda, name, lambda *_, **__: None)
    torch.cuda.current_device = lambda: torch.device("cpu")


def _replace_in_openrlhf() -> None:
    import deepspeed
    import openrlhf.models.actor
    import openrlhf.utils.deepspeed.deepspeed as strategy
    import openrlhf.utils.utils
    from openrlhf.datasets.sft_dataset import SFTDataset
    from openrlhf.utils.distributed_sampler import DistributedSampler

    make_mesh = strategy.init_device_mesh
    strategy.init_device_mesh = lambda _device, *args, **names: make_mesh("cpu", *args, **names)
    if hasattr(strategy.DeepspeedStrategy, "create_optimizer"):
        strategy.DeepspeedStrategy.create_optimizer = lambda _self, model, **_: optimizer(
            _Current.session.case, model.parameters()
        )
    strategy.DeepspeedStrategy.save_model = lambda *_, **__: None
    openrlhf.utils.utils.convert_to_torch_dtype = lambda _: _dtype()
    _with(DistributedSampler, shuffle=False)
    _with(SFTDataset, num_processors=None)
    # With packing the program insists on flash attention.
    _with(openrlhf.models.actor.Actor, attn_implementation="eager")
    initialize = deepspeed.initialize

    def watched(**names):
        _complete_configuration(names["config"])
        if names.get("optimizer") is None:
            names["optimizer"] = _optimizer(names.pop("model_parameters"))
        result = initialize(**names)
        _follow(result[0])
        return result

    deepspeed.initialize = watched


def _with(kind, **fixed) -> None:
    """Fix keyword arguments of a class's constructor."""
    original = kind.__init__

    def constructor(self, *args, **names):
        original(self, *args, **{**names, **fixed})

    kind.__init__ = constructor


def _dtype():
    import torch

    return torch.bfloat16 if _Current.session.case["precision"] == "bfloat16" else torch.float32


def _optimizer(parameters):
    return optimizer(_Current.session.case, parameters)


def _complete_configuration(config) -> None:
    """What a client optimizer on a CPU needs of the strategy's own configuration; the rest stays."""
    config.pop("optimizer", None)
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    config["bf16"] = {"enabled": _Current.session.case["precision"] == "bfloat16"}
    config["zero_optimization"] |= {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}


def _follow(engine) -> None:
    """Watch the model inside the engine, and note its parameters after every step of the optimizer."""
    session = _Current.session
    _Current.engine = engine
    session.watch(engine.module)
    session.parameters(_parameters(engine))
    step = engine.step

    def counted(*args, **names):
        taken = engine.global_steps
        result = step(*args, **names)
        if engine.global_steps > taken and session.stepped(_parameters(engine)):
            session.stop()
        return result

    engine.step = counted


def _parameters(engine):
    """Names and tensors: the float32 master weights where the engine keeps them, as they are not rounded."""
    from deepspeed.utils import safe_get_full_fp32_param

    pairs = []
    for name, parameter in engine.module.named_parameters():
        master = safe_get_full_fp32_param(parameter) if engine.zero_optimization_stage() else None
        pairs.append((name, parameter if master is None else master))
    return pairs

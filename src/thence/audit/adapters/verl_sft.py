"""verl's supervised fine-tuning: its own `SFTTrainer` with the FSDP2 engine, sharded over the ranks.

Rows are fed as a parquet file of messages, which verl renders turn by turn with the tokenizer's chat template. verl has
no CPU platform: one is registered through its plugin registry, and its FSDP engine is taken for it. Switched off: the
sampler's shuffling (verl has no setting for it), clipping (an infinite threshold), warm-up, saving, validation,
compilation, removal of padding and dynamic micro-batches. In float32 cases `engine.mixed_precision.param_dtype` is
fp32, since `engine.dtype` alone leaves verl's bfloat16 autocast on.

`packing` is verl's removal of padding with dynamic micro-batches: all rows of a rank go forward as one. Options are
further overrides in verl's own dotted names.

Known limits: verl drops a window that is not full; where there is no full one it stops with a division by zero, and the
case is skipped.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import math
import os
import types
from pathlib import Path

from ._shared import join_alone

STACK = "verl"
PACKAGES = ("verl", "transformers", "tensordict", "torch")
AXES = frozenset({"ranks", "incomplete", "epochs", "adamw", "bfloat16", "autocast", "packing", "checkpointing"})
CASES = (
    {"name": "padding removed, micro 2 x 4", "options": {"model.use_remove_padding": True}},
    {
        "name": "dynamic micro-batches of 64 tokens, 2 ranks",
        "micro_batch": 2,
        "accumulation": 2,
        "ranks": 2,
        "options": {
            "model.use_remove_padding": True,
            "data.use_dynamic_bsz": True,
            "data.max_token_len_per_gpu": 64,
        },
        "quick": True,
    },
    {
        "name": "gradients summed over ranks once, micro 2 x 2, 2 ranks",
        "micro_batch": 2,
        "accumulation": 2,
        "ranks": 2,
        "options": {"engine.use_no_sync_for_gradient_accumulation": True},
    },
    {"name": "7 examples, micro 1 x 3, 2 ranks", "micro_batch": 1, "accumulation": 3, "ranks": 2, "examples": 7},
)

PRECISION = {
    "float32": {"engine.model_dtype": "fp32", "+engine.mixed_precision.param_dtype": "fp32"},
    "autocast": {"engine.model_dtype": "fp32"},
    "bfloat16": {"engine.model_dtype": "bf16"},
}


def prepare() -> None:
    """Import the stack and give it a CPU platform; verl wants the variables of a world even for one process."""
    join_alone()
    os.environ |= {"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda", "VERL_ENGINE_VENDOR": "nvidia"}
    os.environ.setdefault("VERL_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _register_cpu()
    import verl.trainer.sft_trainer  # pyright: ignore
    import verl.workers.engine  # noqa: F401  # pyright: ignore


def run(case: dict, session) -> None:
    """One case through `SFTTrainer.fit`."""
    import hydra  # pyright: ignore
    from verl.trainer.sft_trainer import SFTTrainer  # pyright: ignore

    _join(session.ranks)
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        overrides = [f"{name}={_text(value)}" for name, value in settings(case, session).items()]
        config = hydra.compose("sft_trainer_engine", overrides)
    trainer = SFTTrainer(config)
    if len(trainer.train_dataloader) == 0:
        session.skip(
            "verl drops a window that is not full, and with no full one (here "
            f"{case['examples']} examples in windows of {config.data.train_batch_size}) it stops with ZeroDivisionError"
        )
    trainer.train_sampler.shuffle = False
    engine = trainer.engine
    step = engine.optimizer_step

    def watched_step():
        norm = step()
        if session.stepped(gathered(engine.module)):
            session.stop()
        return norm

    engine.optimizer_step = watched_step
    # verl saves after its last step under all settings.
    trainer.ckpt_handler.save_checkpoint = lambda step: session.stop()
    session.watch(engine.module)
    session.parameters(gathered(engine.module))
    trainer.fit()


def settings(case: dict, session) -> dict:
    """The case as overrides of verl's configuration."""
    window = case["micro_batch"] * case["accumulation"] * session.ranks
    chosen = {
        "model.path": session.model,
        "model.use_remove_padding": False,
        "model.enable_gradient_checkpointing": case["checkpointing"],
        "+model.override_config.attn_implementation": "sdpa",
        "data.train_files": write_parquet(session),
        "data.train_batch_size": window,
        "data.micro_batch_size_per_gpu": case["micro_batch"],
        "data.use_dynamic_bsz": False,
        "data.num_workers": 0,
        "engine.strategy": "fsdp2",
        "engine.use_torch_compile": False,
        "optim.lr": case["lr"],
        "optim.lr_scheduler_type": "constant",
        "optim.weight_decay": 0.0,
        "optim.clip_grad": case["clip"] or math.inf,
        "optim.optimizer": "SGD",
        "trainer.device": "cpu",
        "trainer.default_local_dir": session.scratch,
        "trainer.total_epochs": case["epochs"],
        "trainer.logger": ["console"],
        "trainer.resume_mode": "disable",
        **PRECISION[case["precision"]],
    }
    if case["optimizer"] == "adamw":
        chosen |= {"optim.optimizer": "AdamW", "optim.betas": [0.0, 0.999]}
        chosen["+optim.override_optimizer_config.eps"] = case["eps"]
    if case["packing"]:
        chosen |= {
            "model.use_remove_padding": True,
            "data.use_dynamic_bsz": True,
            "data.max_token_len_per_gpu": 4096,
            "data.train_batch_size": case["examples"],
        }
    return chosen | case["options"]


def write_parquet(session) -> str:
    """The messages of the case as a parquet file."""
    import pyarrow
    import pyarrow.parquet

    path = Path(session.scratch) / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(session.rows("messages")), path)
    return str(path)


def gathered(module) -> list:
    """Names and full tensors of a sharded module; every rank must call it."""
    return [
        (name, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor)
        for name, tensor in module.named_parameters()
    ]


def _text(value) -> str:
    """A value in the grammar of hydra's overrides."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(_text(item) for item in value) + "]"
    return f"'{value}'" if isinstance(value, str) else str(value)


def _join(ranks: int) -> None:
    """A process group on the CPU, kept for the cases to come."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    if dist.is_initialized():
        return
    if ranks == 1:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group("gloo")


def _register_cpu() -> None:
    """A platform of verl's that is the CPU."""
    import torch
    from verl.plugin.platform.platform_base import PlatformBase  # pyright: ignore
    from verl.plugin.platform.platform_manager import PlatformRegistry  # pyright: ignore

    answers = {
        "is_available": True,
        "current_device": "cpu",
        "device_count": 1,
        "get_device_capability": (None, None),
        "communication_backend_name": "gloo",
        "visible_devices_envvar": "CUDA_VISIBLE_DEVICES",
        "ray_resource_name": "CPU",
        "ray_noset_envvars": [],
        "is_ipc_supported": False,
    }
    idle = ("set_device", "synchronize", "manual_seed", "manual_seed_all", "set_allocator_settings", "empty_cache")
    idle += ("profiler_start", "profiler_stop", "cudart")

    def answer(value):
        return lambda self, *args, **kwargs: value

    memory = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
    device = types.SimpleNamespace(
        mem_get_info=lambda *args: (1, 1),
        get_device_name=lambda *args: "cpu",
        is_available=lambda: False,
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
        **{name: lambda *args, **kwargs: 0 for name in memory},
        **{name: lambda *args, **kwargs: None for name in idle},
    )
    members = {name: answer(value) for name, value in answers.items()}
    members |= {name: answer(None) for name in idle}
    members |= {
        "device_name": property(lambda self: "cpu"),
        "vendor_name": property(lambda self: "cpu"),
        "device_module": property(lambda self: device),
        "nvtx_range": lambda self, message: contextlib.nullcontext(),
    }
    PlatformRegistry.register(platform="cpu")(type("PlatformCPU", (PlatformBase,), members))

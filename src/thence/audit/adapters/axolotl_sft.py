"""axolotl's supervised fine-tuning: its own configuration, data loading, ``HFCausalTrainerBuilder`` and trainer.

Rows are fed as a JSON Lines file of messages to ``chat_template`` with the tokenizer's own template; only assistants'
turns are trained. The calls are those of ``axolotl train``: ``load_cfg``, ``load_datasets``,
``setup_model_and_trainer``, ``execute_training``. Switched off: shuffling (``curriculum_sampling``,
``shuffle_merged_datasets``), clipping unless the case asks for it, warm-up, saving, evaluation, telemetry. Full
parameters, no adapters.

``load_cfg`` asks the GPU what it can do; here it is told one with bfloat16, and so is the check of transformers, which
axolotl cannot tell to use a CPU. Nothing of the trainer is replaced. One rank only: on a CPU axolotl joins no process
group by itself, and every process would train the same rows. The bfloat16 case is axolotl's ``bf16: true``, which
loads the weights in bfloat16. Sample packing runs with scaled dot-product attention, since a CPU has no flash
attention. Options are further keys of axolotl's configuration.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from . import transformers as hf

STACK = "axolotl"
PACKAGES = ("axolotl", "transformers", "accelerate", "datasets", "torch")
AXES = (hf.AXES - {"resume", "saved", "evaluation", "label_smoothing", "autocast", "ranks"}) | {"packing"}
PACKED_LENGTH = 64
"""Tokens in a packed row of the own cases: the probe's examples fill several such rows."""
CASES: tuple[dict, ...] = (
    {
        "name": "sample packing, several rows, micro 1 x 2",
        "micro_batch": 1,
        "accumulation": 2,
        "packing": True,
        "quick": True,
        "options": {"sequence_len": PACKED_LENGTH},
    },
    {
        "name": "sample packing, multipack_real_batches, micro 2 x 1",
        "micro_batch": 2,
        "accumulation": 1,
        "packing": True,
        "options": {"sequence_len": PACKED_LENGTH, "multipack_real_batches": True},
    },
    {"name": "chunked cross entropy, micro 2 x 4", "options": {"chunked_cross_entropy": True}},
    {"name": "train_on_inputs, micro 2 x 4", "options": {"train_on_inputs": True}, "extra": True},
    {"name": "eaft loss, micro 2 x 4", "options": {"use_eaft": True}, "extra": True},
)


def prepare() -> None:
    """Import the stack."""
    hf.quiet()
    os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("AXOLOTL_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    import axolotl.cli.train
    import axolotl.common.datasets
    import axolotl.train  # noqa: F401


def run(case: dict, session: Any) -> None:
    """One case by the calls of ``axolotl train``."""
    from axolotl.cli.args import TrainerCliArgs  # pyright: ignore
    from axolotl.cli.config import load_cfg  # pyright: ignore
    from axolotl.common.datasets import load_datasets  # pyright: ignore
    from axolotl.train import execute_training, setup_model_and_trainer  # pyright: ignore
    from axolotl.utils.dict import DictDefault  # pyright: ignore

    _answer_for_cpu()
    _forget_last_case()
    cfg = load_cfg(DictDefault(arguments(case, session)))
    data = load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
    trainer, model, *_ = setup_model_and_trainer(cfg, data)
    session.watch(model)
    session.parameters(model)
    trainer.add_callback(hf.watch_steps(session, model))
    execute_training(cfg, trainer, None)


def arguments(case: dict, session: Any) -> dict[str, Any]:
    """The case in the keys of axolotl's configuration."""
    scratch = Path(session.scratch)
    settings = {
        "base_model": str(Path(session.model).resolve()),
        "datasets": [
            {
                "path": str(Path(session.data("messages")).resolve()),
                "ds_type": "json",
                "type": "chat_template",
                "roles_to_train": ["assistant"],
                "train_on_eos": "turn",
            }
        ],
        "chat_template": "tokenizer_default",
        "dataset_prepared_path": str(scratch / "prepared"),
        "shuffle_merged_datasets": False,
        "dataset_num_proc": 1,
        "curriculum_sampling": True,
        "sequence_len": 512,
        "min_sample_len": 1,
        "pad_to_sequence_len": False,
        "sample_packing": case["packing"],
        "sample_packing_sequentially": True,
        "eval_sample_packing": False,
        "train_on_inputs": False,
        "micro_batch_size": case["micro_batch"],
        "gradient_accumulation_steps": case["accumulation"],
        "num_epochs": case["epochs"],
        "learning_rate": case["lr"],
        "lr_scheduler": case["schedule"],
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": case["clip"],
        "optimizer": "sgd",
        "gradient_checkpointing": case["checkpointing"],
        "bf16": case["precision"] == "bfloat16",
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "dataloader_pin_memory": False,
        "dataloader_num_workers": 0,
        "dataloader_drop_last": False,
        "output_dir": str(scratch / "out"),
        "save_strategy": "no",
        "logging_steps": 1000,
        "val_set_size": 0,
        "seed": 0,
    }
    if case["checkpointing"]:
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if case["optimizer"] == "adamw":
        settings |= {"optimizer": "adamw_torch", "adam_beta1": 0.0, "adam_beta2": 0.999, "adam_epsilon": case["eps"]}
    return {name: value for name, value in (settings | case["options"]).items() if value is not None}


def _answer_for_cpu() -> None:
    """axolotl asks a GPU what it can do before it checks a configuration."""
    from axolotl.cli import config  # pyright: ignore
    from transformers import training_args

    training_args.is_torch_bf16_gpu_available = lambda: True  # pyright: ignore
    config.gpu_capabilities = lambda: (
        {"bf16": True, "fp8": False, "n_gpu": 1, "n_node": 1, "compute_capability": None},
        {"torch_version": __import__("torch").__version__.split("+")[0]},
    )


def _forget_last_case() -> None:
    """accelerate keeps device, ranks and precision of the first trainer for the whole process, and axolotl its own
    reference to them."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from axolotl.utils import distributed  # pyright: ignore

    distributed.distributed_state = None
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()

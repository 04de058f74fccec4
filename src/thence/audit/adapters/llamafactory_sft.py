"""LLaMA-Factory's supervised fine-tuning: its own `run_exp` with its arguments, template, collator and trainer.

Rows are fed as an alpaca data set, which LLaMA-Factory renders with its `default` template ("Human: ...", "Assistant:
..."); the audit finds the examples again in what goes forward. Switched off: shuffling (`disable_shuffling`), clipping,
warm-up, logging, saving, evaluation. Full parameters, no adapters.

Known limits: rows are padded to a multiple of eight, and the template's line break after the end token is trained, as
LLaMA-Factory has it. `packing` is LLaMA-Factory's plain packing, in which a row sees the rows before it; the option
`neat_packing` keeps them apart. Its `pure_bf16` asks for a GPU; that check is answered with yes for the bfloat16 case,
which starts from a bfloat16 copy of the model, since LLaMA-Factory keeps the checkpoint's dtype. torchvision and
torchaudio are not needed: where torchaudio is missing an empty module stands in, and a pair built for another torch is
better uninstalled. Options are further arguments of LLaMA-Factory.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import shutil
import sys
import types
from pathlib import Path

from . import transformers as hf

STACK = "llamafactory"
PACKAGES = ("llamafactory", "transformers", "accelerate", "datasets", "torch")
AXES = (hf.AXES - {"resume", "saved"}) | {"packing"}
CASES = (
    {"name": "packing, micro 1 x 2", "micro_batch": 1, "accumulation": 2, "packing": True},
    {
        "name": "neat packing, micro 1 x 2",
        "micro_batch": 1,
        "accumulation": 2,
        "packing": True,
        "options": {"neat_packing": True},
        "quick": True,
    },
    {"name": "the tokenizer's own template, micro 2 x 4", "options": {"template": None}},
)

PACKED_LENGTH = 136
"""Tokens of a packed row, a multiple of eight: the probe's first eight examples fill more than one."""


def prepare() -> None:
    """Import the stack; without torchaudio its import of it gets an empty module."""
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "ERROR")
    os.environ.setdefault("DISABLE_VERSION_CHECK", "1")
    if importlib.util.find_spec("torchaudio") is None:
        module = types.ModuleType("torchaudio")
        module.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
        sys.modules["torchaudio"] = module
    import llamafactory.train.tuner  # noqa: F401  # pyright: ignore


def run(case: dict, session) -> None:
    """One case through `run_exp`."""
    from llamafactory.train.tuner import run_exp  # pyright: ignore
    from transformers import TrainerCallback

    class StepCallback(TrainerCallback):
        """Tells the session of every optimizer step; leaving by exception skips the saving at the end."""

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            session.watch(model)
            session.parameters(model)

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if session.stepped(model):
                session.stop()

        def on_train_end(self, args, state, control, **kwargs):
            session.stop()

    _forget_last_case()
    settings = arguments(case, session)
    if case["precision"] == "bfloat16":
        _allow_pure_bf16()
        settings["model_name_or_path"] = _bfloat16_copy(session)
    run_exp(settings, [StepCallback()])


def arguments(case: dict, session) -> dict:
    """The arguments of the case in LLaMA-Factory's own names."""
    scratch = Path(session.scratch)
    entry = {"probe": {"file_name": str(Path(session.data("alpaca")).resolve())}}
    (scratch / "dataset_info.json").write_text(json.dumps(entry), encoding="utf-8")
    settings = {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": session.model,
        "template": "default",
        "dataset": "probe",
        "dataset_dir": str(scratch),
        "cache_dir": str(scratch / "cache"),
        "overwrite_cache": True,
        "cutoff_len": 512,
        "output_dir": str(scratch / "out"),
        "disable_shuffling": True,
        "per_device_train_batch_size": case["micro_batch"],
        "gradient_accumulation_steps": case["accumulation"],
        "num_train_epochs": case["epochs"],
        "learning_rate": case["lr"],
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": case["clip"],
        "optim": "sgd",
        "label_smoothing_factor": case["label_smoothing"],
        "disable_gradient_checkpointing": not case["checkpointing"],
        "use_cpu": True,
        "bf16": case["precision"] == "autocast",
        "pure_bf16": case["precision"] == "bfloat16",
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "ddp_backend": "gloo" if session.ranks > 1 else None,
    }
    if case["optimizer"] == "adamw":
        settings |= {"optim": "adamw_torch", "adam_beta1": 0.0, "adam_beta2": 0.999, "adam_epsilon": case["eps"]}
    if case["packing"]:
        settings |= {"packing": True, "cutoff_len": PACKED_LENGTH}
    return settings | case["options"]


def _forget_last_case() -> None:
    """accelerate keeps device, ranks and precision of the first trainer for the whole process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()


def _allow_pure_bf16() -> None:
    """LLaMA-Factory refuses `pure_bf16` without a GPU that has it; a CPU has it too."""
    from llamafactory.hparams import parser  # pyright: ignore

    parser.is_torch_bf16_gpu_available = lambda: True


def _bfloat16_copy(session) -> str:
    """Folder of the probe's model with bfloat16 weights."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = Path(session.scratch) / "model-bfloat16"
    shutil.copytree(session.model, folder)
    state = load_file(str(folder / "model.safetensors"))
    cast = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    save_file(cast, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {name: "bfloat16" for name in ("dtype", "torch_dtype") if name in config}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)

"""Drives ``transformers.Trainer`` from 4.45 on, on the probe's rows (input_ids, labels) with a padding collator.

Switched off: shuffling (a sequential sampler; accelerate still deals its batches to the ranks), clipping unless the
case asks for it, warm-up, decay of the learning rate, logging and saving. Cases that resume keep the Trainer's own
shuffling and a linear decay, save by `save_steps` and go on by `resume_from_checkpoint` in a new Trainer; `save_model`
and `evaluate` are called after the steps. Option ``reports`` names the mean that the evaluation is known to report.
Ranks talk over gloo.

Limits: the Trainer has no packing. It decides itself what becomes of an incomplete window and of batches that do not
divide by the ranks; the adapter leaves that as it is.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

from ._shared import EVALUATED, RESUMED, SAVED

STACK = "transformers"
PACKAGES = ("transformers", "accelerate", "torch")
AXES = frozenset(
    {
        "ranks",
        "incomplete",
        "epochs",
        "adamw",
        "bfloat16",
        "autocast",
        "checkpointing",
        "label_smoothing",
        "resume",
        "saved",
    }
)
REPORTS = "row-weighted-batch-mean"
"""The mean that the Trainer's evaluation reports, in all versions: it repeats a batch's mean loss once a row."""
CASES: tuple[dict, ...] = (
    {
        "name": "2 ranks, average_tokens_across_devices off",
        "micro_batch": 2,
        "accumulation": 2,
        "ranks": 2,
        "options": {"average_tokens_across_devices": False},
        "extra": True,
    },
    {"name": "resume in the second epoch", "micro_batch": 2, "accumulation": 2, **RESUMED, "save_after": 4},
    {"name": "resume, 2 ranks", "micro_batch": 2, "accumulation": 1, "ranks": 2, **RESUMED},
    {"name": "what is saved, 2 ranks", "micro_batch": 2, "accumulation": 1, "ranks": 2, **SAVED},
    {"name": "evaluation in batches of 2", **EVALUATED, "options": {"reports": REPORTS}},
)


def prepare() -> None:
    """Import the stack."""
    quiet()
    import transformers

    # Names are looked up lazily; resolving them here keeps their import out of the first case.
    for name in ("AutoModelForCausalLM", "Trainer", "TrainerCallback", "TrainingArguments"):
        getattr(transformers, name)


def run(case: dict, session: Any) -> None:
    """One case."""
    import transformers
    from torch.utils.data import SequentialSampler

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any):
            return SequentialSampler(self.train_dataset)  # pyright: ignore

    options = {name: value for name, value in case["options"].items() if name != "reports"}

    def make(model: Any, callback: Any):
        return (transformers.Trainer if case["beyond"] == "resume" else InOrder)(
            model=model,
            args=build(transformers.TrainingArguments, settings(case, session), options, session),
            train_dataset=session.rows(),
            eval_dataset=session.rows(),
            data_collator=padding_collator(model.config.pad_token_id),
            callbacks=[callback],
        )

    act(case, session, make)


def quiet() -> None:
    """Environment variables that keep a Trainer from looking for trackers, the hub or tokenizer threads."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("WANDB_MODE", "disabled")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def load_model(case: dict, session: Any):
    """The probe's model; its parameters (not its rotary tables) in bfloat16 if the case says so."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(session.model)
    dtype = torch.bfloat16 if case["precision"] == "bfloat16" else torch.float32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.use_cache = False
    return model


def settings(case: dict, session: Any) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments (and of TRL's configurations) for a case."""
    # Before version 5 TrainingArguments left the precision of one case here for the next.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    adamw = case["optimizer"] == "adamw"
    return {
        "output_dir": session.scratch,
        "per_device_train_batch_size": case["micro_batch"],
        "gradient_accumulation_steps": case["accumulation"],
        "num_train_epochs": case["epochs"],
        "learning_rate": case["lr"],
        "lr_scheduler_type": case["schedule"],
        "warmup_steps": 0,
        "optim": "adamw_torch" if adamw else "sgd",
        "adam_beta1": case["betas"][0],
        "adam_beta2": case["betas"][1],
        "adam_epsilon": case["eps"],
        "weight_decay": 0.0,
        "max_grad_norm": case["clip"],
        "bf16": case["precision"] == "autocast",
        "fp16": False,
        "gradient_checkpointing": case["checkpointing"],
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if case["checkpointing"] else None,
        "label_smoothing_factor": case["label_smoothing"],
        "use_cpu": True,
        "ddp_backend": "gloo" if session.ranks > 1 else None,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "logging_strategy": "no",
        "save_strategy": "steps" if case["beyond"] == "resume" else "no",
        "save_steps": case["save_after"] or 500,
        "per_device_eval_batch_size": case["micro_batch"],
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def build(kind: Any, wanted: dict[str, Any], options: dict[str, Any], session: Any):
    """A configuration object of class ``kind``; a case with an option that this version lacks is skipped."""
    known = inspect.signature(kind).parameters
    missing = [name for name in (*wanted, *options) if name not in known]
    # Without an entry these two change nothing in a version that has no such argument.
    missing = [name for name in missing if name in options or wanted[name]]
    if missing:
        session.skip(f"this version has no {missing[0]} in {kind.__name__}")
    return kind(**{name: value for name, value in {**wanted, **options}.items() if name in known})


def padding_collator(pad: int):
    """Rows of unequal length to tensors of shape (rows, longest), padded on the right."""
    import torch

    def collate(rows: list[dict]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in rows)

        def filled(lists: list[list[int]], filler: int):
            return torch.tensor([[*items, *[filler] * (longest - len(items))] for items in lists])

        return {
            "input_ids": filled([row["input_ids"] for row in rows], pad),
            "attention_mask": filled([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": filled([row["labels"] for row in rows], -100),
        }

    return collate


def act(case: dict, session: Any, make: Any) -> None:
    """Let a Trainer do what the case looks at.

    Args:
        make: model, callback -> the Trainer; called again where a case resumes, as a new process would.
    """
    model = load_model(case, session)
    trainer = make(model, watch_steps(session, model))
    train(trainer, model, session)
    if case["beyond"] == "saved":
        trainer.save_model(str(Path(session.scratch) / "model"))
        if session.rank == 0:
            session.saved(Path(session.scratch) / "model")
    elif case["beyond"] == "evaluation":
        session.evaluation()
        session.evaluated(trainer.evaluate()["eval_loss"])
    elif case["beyond"] == "resume":
        session.restart()
        model = load_model(case, session)
        session.watch(model)
        again = make(model, watch_steps(session, model, loaded=True))
        folder = Path(session.scratch).with_name("scratch-0") / f"checkpoint-{case['save_after']}"
        again.train(resume_from_checkpoint=str(folder))


def watch_steps(session: Any, model: Any, loaded: bool = False):
    """A callback that keeps the parameters after each optimizer step and ends training when the case has its steps.

    Args:
        loaded: also keep them when training begins, after a checkpoint was loaded.
    """
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any):
            if loaded:
                session.parameters(model)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any):
            if session.stepped(model):
                control.should_training_stop = True

    return Steps()


def train(trainer: Any, model: Any, session: Any) -> None:
    """Watch the model, keep its first parameters, and let the Trainer run."""
    session.watch(model)
    session.parameters(model)
    trainer.train()

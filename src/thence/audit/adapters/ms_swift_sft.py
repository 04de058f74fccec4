"""ms-swift's supervised fine-tuning: its own ``SwiftSft`` with its arguments, template, collator and trainer.

Rows are fed as a JSON Lines file of messages, which ms-swift renders with its ``default`` template ("### Human: ...",
"### Assistant: ..."); the audit finds the examples again in what goes forward. Switched off: shuffling
(``train_dataloader_shuffle``, ``dataset_shuffle``), clipping unless the case asks for it, warm-up, saving, evaluation.
Full parameters, no adapters. Of the class only ``train`` is extended, to add a callback to the finished trainer.

Packing and padding-free batches ask for flash attention, which a CPU lacks: ms-swift refuses them, and those cases are
skipped. Options are further arguments of ms-swift.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from . import transformers as hf

STACK = "ms-swift"
PACKAGES = ("ms-swift", "transformers", "accelerate", "datasets", "torch")
AXES = (hf.AXES - {"resume", "saved", "evaluation"}) | {"packing"}
CASES: tuple[dict, ...] = (
    {"name": "padding-free, micro 2 x 4", "options": {"padding_free": True}},
    {"name": "channel loss, micro 2 x 4", "options": {"enable_channel_loss": True}, "quick": True},
    {
        "name": "channel loss, 2 ranks",
        "micro_batch": 2,
        "accumulation": 2,
        "ranks": 2,
        "options": {"enable_channel_loss": True},
    },
    {"name": "loss type cross_entropy, micro 2 x 4", "options": {"loss_type": "cross_entropy"}},
    {"name": "loss_scale last_round, micro 2 x 4", "options": {"loss_scale": "last_round"}},
    {"name": "loss_scale all, micro 2 x 4", "options": {"loss_scale": "all"}, "extra": True},
    {"name": "enable_dft_loss, micro 2 x 4", "options": {"enable_dft_loss": True}, "extra": True},
    {
        "name": "2 ranks, average_tokens_across_devices off",
        "micro_batch": 2,
        "accumulation": 2,
        "ranks": 2,
        "options": {"average_tokens_across_devices": False},
        "extra": True,
    },
)


def prepare() -> None:
    """Import the stack."""
    hf.quiet()
    os.environ.setdefault("LOG_LEVEL", "ERROR")
    os.environ.setdefault("USE_HF", "1")
    from swift.pipelines.train.sft import SwiftSft  # noqa: F401  # pyright: ignore


def run(case: dict, session: Any) -> None:
    """One case through ``SwiftSft``."""
    from swift.arguments import SftArguments  # pyright: ignore
    from swift.pipelines.train.sft import SwiftSft  # pyright: ignore

    if case["packing"] or case["options"].get("padding_free"):
        session.skip("ms-swift packs only with flash attention, which a CPU lacks")

    class Watched(SwiftSft):
        """Watches the finished trainer."""

        def train(self, trainer: Any) -> Any:
            session.watch(trainer.model)
            session.parameters(trainer.model)
            trainer.add_callback(hf.watch_steps(session, trainer.model))
            return super().train(trainer)

    _forget_last_case()
    Watched(SftArguments(**arguments(case, session))).main()


def arguments(case: dict, session: Any) -> dict[str, Any]:
    """The arguments of the case in ms-swift's own names."""
    scratch = Path(session.scratch)
    own = hf.settings(case, session)
    for name in ("remove_unused_columns", "disable_tqdm", "save_steps", "report_to"):
        own.pop(name)
    dtype = "bfloat16" if case["precision"] == "bfloat16" else "float32"
    return own | {
        "model": str(Path(session.model).resolve()),
        "model_type": "llama",
        "template": "default",
        "torch_dtype": dtype,
        "tuner_type": "full",
        "dataset": [str(Path(session.data("messages")).resolve())],
        "split_dataset_ratio": 0.0,
        "dataset_shuffle": False,
        "train_dataloader_shuffle": False,
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "load_from_cache_file": False,
        "output_dir": str(scratch / "out"),
        "add_version": False,
        "report_to": [],
        "eval_strategy": "no",
        "check_model": False,
        "loss_scale": "default",
        "logging_steps": 1000,
        "packing": case["packing"],
    } | case["options"]  # fmt: skip


def _forget_last_case() -> None:
    """accelerate keeps device, ranks and precision of the first trainer for the whole process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()

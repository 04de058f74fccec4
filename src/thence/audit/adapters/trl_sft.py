"""Drives TRL's ``SFTTrainer``: TRL tokenizes the texts, masks prompts, pads or packs, and computes the loss.

Options, beside any argument of ``SFTConfig``: ``layout``, one of ``chat-prompt-completion`` (default), ``messages``
(with ``assistant_only_loss``) and ``prompt-completion`` (text); ``policy``, what a loss whose weights depend on the
policy asks by its formula.

Switched off: shuffling (a sequential sampler; accelerate still deals batches to the ranks), clipping unless the case
asks for it, warm-up, logging and saving; TRL's own defaults of bf16 and activation checkpointing follow the case.

Limits: packing and padding-free batches run with the model's default attention, since a CPU has no flash attention.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import inspect
import os
from typing import Any

from . import transformers as hf
from ._shared import EVALUATED, RESUMED

STACK = "trl"
PACKAGES = ("trl", "transformers", "accelerate", "datasets", "torch")
AXES = hf.AXES | {"packing"}
PACKED_LENGTH = 64
"""Tokens in a packed row of the own cases: the probe's examples fill several such rows."""
DFT = {"scale": "none", "demonstration": "probability", "normaliser": "token-mean"}
"""What DFT asks of every token: the gradient of its probability, over the trained tokens of the step."""
STEPS = {"micro_batch": 2, "accumulation": 2, "epochs": 2, "steps": 3, "lr": 0.1}
CASES: tuple[dict, ...] = (
    {"name": "assistant-only loss on messages", "options": {"layout": "messages", "assistant_only_loss": True}},
    {"name": "prompt and completion as text", "options": {"layout": "prompt-completion"}},
    {"name": "padding-free, micro 2 x 4", "options": {"padding_free": True, "max_length": None}},
    {
        "name": "packing bfd, several rows, micro 2 x 2",
        "accumulation": 2,
        "packing": True,
        "options": {"packing_strategy": "bfd", "max_length": PACKED_LENGTH},
    },
    {
        "name": "packing wrapped, one row",
        "micro_batch": 1,
        "accumulation": 1,
        "packing": True,
        "options": {"packing_strategy": "wrapped"},
        "extra": True,
    },
    {"name": "loss type dft", "options": {"loss_type": "dft"}, "extra": True},
    *(
        {"name": name, "ranks": ranks, "options": {"loss_type": "dft", "policy": DFT}, **STEPS}
        for name, ranks in (("dft, 3 steps", 1), ("dft, 3 steps, 2 ranks", 2))
    ),
    {"name": "loss type chunked_nll", "options": {"loss_type": "chunked_nll"}},
    {"name": "resume in the second epoch", "micro_batch": 2, "accumulation": 2, **RESUMED, "save_after": 4},
    {"name": "evaluation in batches of 2", **EVALUATED, "options": {"reports": hf.REPORTS}},
)


def prepare() -> None:
    """Import the stack."""
    hf.prepare()
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from trl import SFTConfig, SFTTrainer  # noqa: F401  # pyright: ignore


def run(case: dict, session: Any) -> None:
    """One case."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer  # pyright: ignore

    options = {name: value for name, value in case["options"].items() if name not in ("reports", "policy")}
    layout = options.pop("layout", "chat-prompt-completion")
    if "loss_type" in options:
        require_choice(SFTConfig, "loss_type", options["loss_type"], session)
    if "packing_strategy" in options:
        require_choice(SFTConfig, "packing_strategy", options["packing_strategy"], session)
    wanted = hf.settings(case, session) | {"remove_unused_columns": True, "packing": case["packing"]}
    if case["packing"]:
        # A row of this length holds all examples: fewer than the probe's model can see.
        options.setdefault("max_length", 512)

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *_: Any, **__: Any):
            return SequentialSampler(self.train_dataset)  # pyright: ignore

    if "policy" in case["options"]:
        shown = [{"reward": 0.0, "group": i, "demonstration": True} for i in range(len(session.rows(layout)))]
        session.say(policy=case["options"]["policy"], rollouts=shown, versions=list(range(case["steps"])))

    def make(model: Any, callback: Any):
        return (SFTTrainer if case["beyond"] == "resume" else InOrder)(
            model=model,
            args=hf.build(SFTConfig, wanted, options, session),
            train_dataset=Dataset.from_list(session.rows(layout)),
            eval_dataset=Dataset.from_list(session.rows(layout)) if case["beyond"] == "evaluation" else None,
            callbacks=[callback],
            **{tokenizer_argument(SFTTrainer): AutoTokenizer.from_pretrained(session.model)},
        )

    hf.act(case, session, make)


def tokenizer_argument(trainer: Any) -> str:
    """What a trainer's class calls its tokenizer: ``processing_class``, or ``tokenizer`` before TRL 0.12."""
    known = inspect.signature(trainer.__init__).parameters
    return "processing_class" if "processing_class" in known else "tokenizer"


def require_choice(config: Any, name: str, value: str, session: Any) -> None:
    """Skip the case if the configuration's own help does not name the value of an option."""
    field = config.__dataclass_fields__.get(name)
    said = "" if field is None else f"{field.metadata.get('help', '')} {field.metadata.get('choices', '')}"
    if f"'{value}'" not in said and f'"{value}"' not in said:
        session.skip(f"this version of TRL has no {name} {value!r} in {config.__name__}")

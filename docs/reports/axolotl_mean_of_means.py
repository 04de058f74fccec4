"""axolotl: the step depends on how the same rows are cut into micro-batches.

    python axolotl_mean_of_means.py

Hands ``AxolotlTrainer`` and transformers' ``Trainer`` the same tiny model and eight rows of very unequal lengths,
trains one step of plain SGD cut as 8 x 1 and 2 x 4, and prints how far apart the two updates are. No GPU, no network.
"""

# pyright: reportMissingImports=false

import math
import os
import tempfile

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

LENGTHS = (4, 30, 3, 25, 12, 5, 40, 8)


def update(axolotl: bool, micro: int, accumulation: int, out: str):
    import torch
    from axolotl.core.trainers.base import AxolotlTrainer
    from axolotl.core.training_args import AxolotlTrainingArguments
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            initializer_range=0.2,
        )
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = [torch.randint(1, 64, (n,)).tolist() for n in LENGTHS]

    def collate(rows):
        longest = max(len(row["input_ids"]) for row in rows)
        return {
            "input_ids": torch.tensor([r["input_ids"] + [0] * (longest - len(r["input_ids"])) for r in rows]),
            "labels": torch.tensor([r["input_ids"] + [-100] * (longest - len(r["input_ids"])) for r in rows]),
        }

    class InOrder(AxolotlTrainer if axolotl else Trainer):  # pyright: ignore[reportGeneralTypeIssues]
        def _get_train_sampler(self, *_, **__):
            return SequentialSampler(self.train_dataset)

    arguments = (AxolotlTrainingArguments if axolotl else TrainingArguments)(
        output_dir=out, use_cpu=True, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation,
        num_train_epochs=1, learning_rate=1.0, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0,
        weight_decay=0.0, report_to="none", save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    trainer = InOrder(
        model=model, args=arguments, train_dataset=Dataset.from_dict({"input_ids": ids}), data_collator=collate
    )
    trainer.train()
    return {n: p.detach() - before[n] for n, p in model.named_parameters()}, trainer.model_accepts_loss_kwargs


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for axolotl in (False, True):
            whole, _ = update(axolotl, 8, 1, folder)
            cut, counted = update(axolotl, 2, 4, folder)
            apart = math.hypot(*(float((cut[n] - whole[n]).norm()) for n in whole))
            size = math.hypot(*(float(change.norm()) for change in whole.values()))
            name = "AxolotlTrainer" if axolotl else "Trainer"
            print(f"{name}: 2 x 4 is {apart / size:.2g} of the update away from 8 x 1, counts tokens: {counted}")

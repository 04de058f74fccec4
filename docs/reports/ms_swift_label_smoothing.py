"""ms-swift: the gradient with label smoothing grows with the accumulation steps.

    python ms_swift_label_smoothing.py

Builds a tiny model, trains one optimizer step of plain SGD on the same eight rows, cut as 8 x 1 and 2 x 4, with and
without ``label_smoothing_factor``, and prints the norm of the update. Needs ms-swift and torch; no GPU and no network.
"""

# pyright: reportMissingImports=false

import json
import math
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LOG_LEVEL", "ERROR")


def folder_of_model(path: Path) -> str:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {chr(i): i - 29 for i in range(32, 127)} | {"\n": 98}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def update(model: str, data: str, out: str, micro: int, accumulation: int, smoothing: float) -> float:
    from swift.arguments import SftArguments
    from swift.pipelines.train.sft import SwiftSft

    kept = {}

    class Kept(SwiftSft):
        def train(self, trainer):
            kept["before"] = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
            kept["model"] = trainer.model
            return super().train(trainer)

    Kept(
        SftArguments(
            model=model,
            model_type="llama",
            template="default",
            torch_dtype="float32",
            tuner_type="full",
            dataset=[data],
            split_dataset_ratio=0.0,
            dataset_shuffle=False,
            train_dataloader_shuffle=False,
            dataset_num_proc=1,
            dataloader_num_workers=0,
            check_model=False,
            output_dir=out,
            use_cpu=True,
            bf16=False,
            fp16=False,
            gradient_checkpointing=False,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            weight_decay=0.0,
            num_train_epochs=1,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            label_smoothing_factor=smoothing,
            report_to=[],
            save_strategy="no",
            eval_strategy="no",
        )
    ).main()
    moved = [float((p - kept["before"][n]).detach().norm()) for n, p in kept["model"].named_parameters()]
    return math.hypot(*moved)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        data = root / "rows.jsonl"
        rows = [
            ("question", "four"),
            ("another", "a much longer answer than that"),
            ("third", "short"),
            ("x", "answer"),
        ]
        lines = [
            json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
            for q, a in rows * 2
        ]
        data.write_text("\n".join(lines) + "\n", encoding="utf-8")
        model = folder_of_model(root / "model")
        for smoothing in (0.0, 0.1):
            for micro, accumulation in ((8, 1), (2, 4)):
                norm = update(model, str(data), str(root / "out"), micro, accumulation, smoothing)
                print(f"label_smoothing_factor {smoothing}, micro {micro} x {accumulation}: update {norm:.3f}")

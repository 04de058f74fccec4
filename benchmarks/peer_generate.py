"""Sampling with `generate` of transformers: one batch of 256 rows, up to 64 new tokens, cache on. Prints one JSON line.

The prompts are repeated to fill `--micro-batch` rows; `--steps` is the number of measured calls. `--length forced`
suppresses the end token, `--length uneven` lets rows end (use the model `small-eos`).
"""

from __future__ import annotations

import argparse
from typing import Any

import common


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if args.accumulation != 1:
        raise SystemExit("--accumulation: one call is one step here, give 1")
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    # `Any`: the stubs give this class no `generate`.
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    prompts = [row["prompt"] for row in common.read_jsonl(args.data)]
    repeats, rest = divmod(args.micro_batch, len(prompts))
    if rest:
        raise SystemExit(f"{args.data}: {len(prompts)} prompts do not divide {args.micro_batch} rows")
    texts = [prompt for prompt in prompts for _ in range(repeats)]
    ending = {"min_new_tokens": common.NEW_TOKENS} if args.length == "forced" else {}
    clock = common.StepClock()
    clock.start()
    for _ in range(args.warmup + args.steps):
        # From text to token ids: what the other side is also timed for.
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        with torch.inference_mode():
            ids = model.generate(
                **inputs,
                max_new_tokens=common.NEW_TOKENS,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                **ending,
            )
        new = ids[:, inputs["input_ids"].shape[1] :]
        # Tokens before a row's first end, and that end.
        ended_before = (new == tokenizer.eos_token_id).int().cumsum(1).roll(1, dims=1)
        ended_before[:, 0] = 0
        clock.count(int((ended_before == 0).sum()), new.numel())
        clock.end_step()
    return common.result(
        args,
        clock,
        tool="transformers.generate",
        version=transformers.__version__,
        counted="sampled tokens, end included",
        rows=args.micro_batch,
    )


def main() -> None:
    parser = common.parser(__doc__, micro_batch=common.PROMPTS * common.GENERATIONS, accumulation=1)
    common.add_length(parser)
    args = parser.parse_args()
    common.set_threads(args.threads)
    common.emit(run(args), args.out)


if __name__ == "__main__":
    main()

"""Sampling with the whole decoding step in one C function against torch's matrix products, by size of model and rows.

    python benchmarks/whole_step.py --out benchmarks/results/whole-step.json

Random Llama models, 64 forced tokens after a prompt of 12. Both ways take turns; least seconds of the rounds. With
--neighbour a Python loop that never waits runs beside them. CPU only; two minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import common
from neighbour import neighbour

SIZES = ((128, 384, 5, 32), (192, 528, 3, 32), (256, 768, 6, 2000), (320, 960, 8, 4000))
"""Width, width of the gate, layers and vocabulary."""
ROWS = (1, 8, 32, 128, 256)
PROMPT = 12


def seconds(model: Any, rows: int, weights: int) -> float:
    """Of sampling so many rows, where models of up to so many weights have the whole step in C."""
    import thence
    from thence.rollout import llama

    llama.WHOLE_STEP = weights
    sampling = thence.Sampling(max_tokens=common.NEW_TOKENS, rows=rows)
    vocabulary = model.config.vocab_size
    prompts = [[(7 * row + place) % vocabulary for place in range(PROMPT)] for row in range(rows)]
    start = time.perf_counter()
    thence.sample(model, prompts, range(rows), sampling)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--neighbour", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import thence  # noqa: F401, I001  # first: it settles how threads wait before torch is loaded
    from transformers import LlamaConfig, LlamaForCausalLM

    found = []
    with neighbour(args.neighbour) if args.neighbour else contextlib.nullcontext():
        for width, inner, layers, vocabulary in SIZES:
            heads = {"num_attention_heads": width // 32, "num_key_value_heads": width // 32}
            config = LlamaConfig(
                hidden_size=width,
                intermediate_size=inner,
                num_hidden_layers=layers,
                vocab_size=vocabulary,
                tie_word_embeddings=True,
                **heads,
            )
            model = LlamaForCausalLM(config).eval()
            for rows in ROWS:
                least = dict.fromkeys((0, 10**12), float("inf"))
                for turn in range(args.rounds + 1):
                    for weights in least:
                        took = seconds(model, rows, weights)
                        least[weights] = min(least[weights], took) if turn else least[weights]
                torchs, whole = (round(value, 4) for value in least.values())
                parameters = sum(parameter.numel() for parameter in model.parameters())
                found.append(
                    {"parameters": parameters, "rows": rows, "torch_s": torchs, "whole_s": whole}
                    | {"ratio": round(torchs / whole, 2)}
                )
                print(json.dumps(found[-1]), flush=True)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", *sys.argv],
        "machine": common.machine(),
        "neighbour": args.neighbour,
        "runs": found,
    }
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What `thence export --gguf` writes, run by llama.cpp: tokens and log-probabilities against transformers.

    python -m venv ENV && ENV/bin/pip install xllamacpp==2026.10.11549
    python benchmarks/gguf_llama_cpp.py RUN --llama-cpp ENV/bin/python --out benchmarks/results/gguf-llama-cpp.json

RUN is a run or model of SmolLM2-135M. Ten prompts are asked greedily, of its export in each type and in float32 with
each kind of scaled RoPE; then of small random Qwen2 and Qwen3 models with the same tokenizer. The log-probabilities are
compared on the tokens that both chose. With q8_0 llama.cpp rounds activations too, so it chooses otherwise sometimes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from thence.recipe import Model
from thence.train.export import export
from thence.train.gguf_export import GgufType, write_gguf
from thence.train.model import load_model
from thence.train.run_models import find_trained

TOKENS = 24
ENVIRONMENT = "xllamacpp 2026.10.11549 (llama.cpp), one thread, keys and values in float32"
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = (
    "The capital of France is",
    "Steps:\n\n1. Heat the oven.\n\n2. Mix 250 g flour and   3 eggs.\n\n3.",
    "def add(a, b):\n    return a + b\n\n\ndef mul(a, b):\n",
    "x =  12\ny =   345\nprint(x * y)  # prints",
    CHAT.format("What is 47 + 8 * 3?"),
    CHAT.format("Name three colours, one a line."),
    "naïve café — 数学 ½ ٣٤٥ 🚀 and so",
    "It's 26, he's 31, WE'VE 4'ss; \t\t7\r\n\r\n8",
    CHAT.format("A farmer has 12 cows and buys 7 more. How many cows does he have?") + "He has 12 + 7 =",
    " ".join(f"{i} plus {i} is {i + i}." for i in range(1, 25)) + " 25 plus 25 is",
)
ROPE: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--llama-cpp", required=True, help="Python of an environment with xllamacpp")
    parser.add_argument("--only", default="", help="only cells whose name holds this; the others stay as they are")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found: dict[str, Any] = json.loads(args.out.read_text(encoding="utf-8"))["cells"] if args.only else {}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        export(find_trained(args.run).folder, place / "model")
        types: tuple[GgufType, ...] = ("f32", "f16", "bf16", "q8_0")
        cells: dict[str, tuple[Callable[[], Path], GgufType]] = {
            f"SmolLM2 {kind}": (lambda: place / "model", kind) for kind in types
        }
        for name, rope in ROPE.items():
            cells[f"SmolLM2 f32, RoPE {name}"] = (lambda rope=rope: with_rope(place, rope)), "f32"
        for family in ("qwen2", "qwen3"):
            cells[f"random {family} f32"] = (lambda family=family: random_model(place, family)), "f32"
        for name, (folder, kind) in cells.items():
            if args.only in name:
                found[name] = cell(folder(), kind, args.llama_cpp)
    record = {
        "command": "python benchmarks/gguf_llama_cpp.py RUN --llama-cpp ENV/bin/python --out " + str(args.out),
        "prompts": len(PROMPTS),
        "tokens": TOKENS,
        "cells": found,
        "environment": f"{ENVIRONMENT}; torch {torch.__version__}, transformers {transformers.__version__}",
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def with_rope(place: Path, rope: dict[str, Any]) -> Path:
    """The model with another RoPE: its words get worse, and both programs must agree on them."""
    folder = place / "scaled"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place / "model", folder, ignore=shutil.ignore_patterns("manifest.json"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["rope_parameters"] |= rope
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def random_model(place: Path, family: str) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), hidden_size=128, intermediate_size=192, num_hidden_layers=3
    )
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 32
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(place / family)
    # without AutoTokenizer's class of the family, which would change how text is cut
    for file in (place / "model").glob("*token*"):
        shutil.copy(file, place / family)
    return place / family


def cell(folder: Path, kind: GgufType, python: str) -> dict[str, Any]:
    """Export one model and compare."""
    file = folder.with_name(f"{folder.name}-{kind}.gguf")
    write_gguf(folder, file, kind)
    asked = json.dumps({"prompts": PROMPTS, "tokens": TOKENS})
    command = [python, str(Path(__file__).with_name("llama_cpp_answers.py")), str(file)]
    said = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    if said.returncode:
        raise SystemExit(said.stderr[-2000:])
    theirs = json.loads(said.stdout)
    opened = load_model(Model(path=str(file.parent), gguf_file=file.name), torch.device("cpu"))  # the rounded weights
    of_source = load_model(Model(path=str(folder)), torch.device("cpu")).tokenizer
    same_tokens, largest = 0, 0.0
    gaps: list[float] = []
    for prompt, answer in zip(PROMPTS, theirs["answers"], strict=True):
        ids = of_source(prompt).input_ids
        same_tokens += ids == answer["prompt_tokens"]
        gap, difference = agreement(opened.model, ids, answer["tokens"], answer["logprobs"])
        gaps += [] if gap is None else [gap]
        largest = max(largest, difference)
    file.unlink()
    result = {
        "prompts_with_the_same_tokens": same_tokens,
        "prompts_with_the_same_greedy_tokens": len(PROMPTS) - len(gaps),
        "largest_gap_where_another_token_was_chosen": max(gaps, default=0.0),
        "largest_difference_of_a_log_probability": largest,
    }
    print(folder.name, kind, json.dumps(result), flush=True)
    return result


@torch.no_grad()
def agreement(
    model: Any, ids: list[int], chosen: list[int], logprobs: list[float | None]
) -> tuple[float | None, float]:
    """How much likelier than the first token that the model would not choose its own choice is (None: it would choose
    all), and the largest difference of a log-probability up to that token, included."""
    rows = model(torch.tensor([[*ids, *chosen]])).logits[0, len(ids) - 1 : -1].float().log_softmax(-1)
    largest = 0.0
    for row, token, logprob in zip(rows, chosen, logprobs, strict=True):
        largest = largest if logprob is None else max(largest, abs(float(row[token]) - logprob))
        if int(row.argmax()) != token:
            return float(row.max() - row[token]), largest
    return None, largest


if __name__ == "__main__":
    main()

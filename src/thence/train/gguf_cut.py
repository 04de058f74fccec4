"""How byte-level tokenizers cut text before they look its pieces up, by llama.cpp's names for it.

A GGUF file holds a vocabulary, merges and such a name (``tokenizer.ggml.pre``), and no pattern. llama.cpp's source has
the pattern of every name (``src/llama-vocab.cpp``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

log = logging.getLogger(__name__)
SMOLLM, GPT2, QWEN2, LLAMA3 = "smollm", "gpt-2", "qwen2", "llama-bpe"
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = {QWEN2: r"\p{N}", LLAMA3: r"\p{N}{1,3}"}
SAME_CUT = {
    **dict.fromkeys((SMOLLM, "starcoder", "refact", "command-r", "codeshell", "exaone"), SMOLLM),
    **dict.fromkeys((GPT2, "phi-2", "olmo", "mpt", "jais"), GPT2),
    **dict.fromkeys((QWEN2, "deepseek-r1-qwen"), QWEN2),
    **dict.fromkeys((LLAMA3, "llama3", "llama-v3"), LLAMA3),
}
"""A name in a file -> the one of the four cuts that it means."""
WHOLE_WORDS = (LLAMA3,)
"""Where llama.cpp looks a whole piece up before it merges (``ignore_merges``)."""
PROBES = (
    "Hello world, it's we'Ve 'RE I'M o'clock 'told 'D\u2019s",
    "  naïve café — 数学 1234567 12345678 3.14 1,000 ½ ² ٣٤٥ x2y10",
    "Steps:\n\n1. one\n\n2. two\n   3\t4  5   66    777\r\n\r\n8 \n 9",
    "def f(x):\n\treturn x  # a\n\n\n    y = f( 7 )  \n \n \t \n",
    '🚀 (normal) 😶\u200d🌫️ ✅ កាន់តែពិសេស 我想在apple工作1314天～ ---===!!!```"""... нещо на Б',
    "नमस्ते e\u0301 \u00a0\u3000x\u2003 y <|a|> __init__ a_b /path\\to @x #1 $2 50% ",
)
"""What tells the cuts from each other: blanks and line ends before digits, runs of digits, marks, capitals after '."""


def make_cut(name: str) -> Any:
    """The pre-tokenizer behind one of the four names, as transformers has it."""
    from tokenizers import Regex, pre_tokenizers

    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == GPT2:
        return whole
    if name == SMOLLM:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    pattern = Regex(_PATTERN.replace("DIGITS", _DIGITS[name]))
    split = pre_tokenizers.Split(pattern, behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def find_cut(backend: Any) -> str | None:
    """Which of the four cuts a tokenizer makes, known by the pieces of a few texts; None: none of them.

    Args:
        backend: a ``tokenizers.Tokenizer``.
    """
    if backend.pre_tokenizer is None:
        return None
    for name in (SMOLLM, GPT2, QWEN2, LLAMA3):
        known = make_cut(name)
        if all(backend.pre_tokenizer.pre_tokenize_str(text) == known.pre_tokenize_str(text) for text in PROBES):
            return name
    return None


def cut_as_said(tokenizer: Any, said: Mapping[str, Any]) -> None:
    """Let a tokenizer that transformers made of a GGUF file cut text as the file says.

    transformers passes over some names: it reads SmolLM2's file, and cuts `"\\n\\n1."` otherwise than SmolLM2 does.

    Args:
        said: the file's metadata.
    """
    if said.get("tokenizer.ggml.model") != "gpt2":  # SentencePiece and others have no such name
        return
    pre = str(said.get("tokenizer.ggml.pre", "none"))
    name = SAME_CUT.get(pre)
    if name is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = make_cut(name)
        tokenizer.backend_tokenizer.model.ignore_merges = name in WHOLE_WORDS
    elif pre not in _names_of_transformers():
        log.warning(
            "the GGUF file names the pre-tokenizer %r, which is not known here: tokens may differ from the model's "
            "own; set model.tokenizer to a Hugging Face folder or hub name with its tokenizer",
            pre,
        )


def _names_of_transformers() -> Mapping[str, str]:
    with suppress(ImportError):
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

        return GGUF_PRE_TOKENIZER_SPLITS
    return {}


def merges_decide(kept: Mapping[str, Any], name: str) -> bool:
    """Whether a tokenizer gives llama.cpp's tokens: looking pieces up whole, or merging them, must not differ where
    llama.cpp does the other of the two.

    Args:
        kept: what tokenizer.json holds.
    """
    from tokenizers import Tokenizer, models

    model = kept["model"]
    if bool(model.get("ignore_merges")) == (name in WHOLE_WORDS):
        return True
    listed = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merges: list[tuple[str, str]] = [(first, second) for first, second in listed]
    merging = Tokenizer(models.BPE(vocab=model["vocab"], merges=merges, ignore_merges=False)).model
    special = {added["content"] for added in kept["added_tokens"]}
    return all(len(merging.tokenize(word)) == 1 for word in model["vocab"] if word not in special)

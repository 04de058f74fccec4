"""The embedded world's tokens, one character each, and a tokenizer that any transformers program can open."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "$"  # begins a text and ends a response
PAD = "_"
UNKNOWN = "~"  # stands for every character that the world does not know
VOCABULARY: tuple[str, ...] = (END, PAD, UNKNOWN, *"0123456789", *"+-*=:,;#?", *"abcd")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The world's tokenizer: a character is a token, `$` is put before every text (unless `add_special_tokens=False`).

    `decode(encode(text), skip_special_tokens=True)` gives back any text made of the vocabulary's other characters.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: i for i, token in enumerate(VOCABULARY)}
    core = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    # A template takes a piece that begins with "$" for a text, so the token `$` goes by the name "begin" in it.
    begin = {"id": "begin", "ids": [ids[END]], "tokens": [END]}
    core.post_processor = processors.TemplateProcessing(single="begin $A", pair="begin $A $B", special_tokens=[begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def save_tokenizer(folder: str | Path) -> None:
    """Write the tokenizer's files into a model's folder, where `AutoTokenizer.from_pretrained` finds them."""
    build_tokenizer().save_pretrained(str(folder))

"""Opening GGUF files: parsed once, and with the parts that transformers passes over.

transformers reads weights, configuration and vocabulary. It leaves out RoPE's scaling, a head's size, and how some
tokenizers cut text, so a model would be another one, without a word.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from thence.recipe.tables import Model
from thence.train.gguf_cut import cut_as_said
from thence.train.gguf_rope import FREQUENCIES, rope_as_said
from thence.train.model_files import resolve


@contextmanager
def read_once() -> Iterator[None]:
    """While it lasts, a GGUF file that is read for configuration, tokenizer and weights is parsed once.

    Parsing the vocabulary takes seconds, and so does the map of names, which would be built for every module.
    """
    try:
        import gguf
    except ImportError:  # transformers says what is missing
        yield
        return
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    if hasattr(gguf.GGUFReader, "cache_info"):  # inside another one
        yield
        return
    # both are looked up in the module at every call; what they give is only read
    gguf.GGUFReader, gguf.get_tensor_name_map = map(functools.cache, before)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = before


def restore_tokenizer(tokenizer: Any, settings: Model) -> None:
    """Let a tokenizer cut text as its GGUF file says. Does nothing where the model is no GGUF file."""
    if settings.gguf_file:
        cut_as_said(tokenizer, _said(_path(settings)))


def restore_config(config: Any, settings: Model) -> None:
    """Give a configuration what its GGUF file says and transformers passes over: RoPE's scaling, the size of a head.

    Does nothing where the model is no GGUF file.

    Raises:
        UserError: a scaling that is not read here.
    """
    if not settings.gguf_file:
        return
    import gguf

    path = _path(settings)
    said = _said(path)
    found = next((tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == FREQUENCIES), None)
    kept = None if found is None else torch.tensor(found.data.reshape(-1), dtype=torch.float32)
    head = said.get(f"{said.get('general.architecture')}.attention.key_length")
    if head and isinstance(getattr(config, "head_dim", None), int):
        config.head_dim = int(head)
    rope_as_said(config, said, kept, Path(settings.gguf_file))


def _path(settings: Model) -> str:
    from transformers.utils.hub import cached_file

    # the same string that transformers opens, so that `read_once` knows it
    return str(cached_file(resolve(settings.path or ""), settings.gguf_file or ""))


def _said(path: str) -> dict[str, Any]:
    """The file's metadata. What stands in it for an array is not to be relied on."""
    try:
        from transformers.integrations.gguf.reader import read_gguf_metadata
    except ImportError:  # an older transformers; the package gguf parses the whole vocabulary, which takes seconds
        import gguf

        return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    return read_gguf_metadata(path)[0]

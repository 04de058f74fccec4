"""Opening GGUF files without reading them three times."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def read_once() -> Iterator[None]:
    """While it lasts, a GGUF file that transformers reads for configuration, tokenizer and weights is parsed once.

    Parsing the vocabulary takes seconds, and so does the map of names, which would be built for every module.
    """
    try:
        import gguf
    except ImportError:  # transformers says what is missing
        yield
        return
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    # both are looked up in the module at every call; what they give is only read
    gguf.GGUFReader, gguf.get_tensor_name_map = map(functools.cache, before)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = before

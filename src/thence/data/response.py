"""The text of a response as graders and readers see it: one rendering for RL, evaluation stages and `thence eval`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def response_text(tokenizer: Any, token_ids: Sequence[int], stop_ids: Sequence[int], opening: str = "") -> str:
    """The text of a response without its end token, after the think tag that the prompt has opened.

    Special tokens inside are kept: where a think tag is one, the rules that look for it need it.

    Args:
        token_ids: the response, with its end token if it came.
        stop_ids: all tokens that end a response.
        opening: the think tag that the prompt ends with (`Rendered.opening`), else "".
    """
    ids = list(token_ids)
    if ids and ids[-1] in stop_ids:
        ids.pop()
    return opening + str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

"""How long a row may be, read from a model's configuration alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from thence.errors import UserError

NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
LONG_ALREADY = ("default", "mrope", "llama3", "longrope", "su")
"""Kinds of RoPE whose `max_position_embeddings` is the length after scaling."""


BY_BATCH = ("dynamic", "longrope", "su")
"""Kinds of RoPE whose angles follow from the longest row of a forward pass, once that is longer than the original
context: there a row's logits would depend on the rows beside it."""


def context_of(config: Any) -> int | None:
    """Most tokens that a model of this configuration was made for, prompt and response together; None: not told.

    Models without positions (Mamba) and with ALiBi (BLOOM, some Falcons) have no limit. Scaling of RoPE counts as vLLM
    counts it: times ``factor``, of ``original_max_position_embeddings`` where that is given. Where angles follow from
    the longest row of a batch (dynamic, longrope), the original context is the limit.
    """
    config = getattr(config, "get_text_config", lambda: config)() or config
    if getattr(config, "alibi", False) is True:
        return None
    told = (getattr(config, name, None) for name in NAMES)
    longest = next((value for value in told if isinstance(value, int) and value > 0), None)
    if longest is None:
        return None
    original = [_original(longest, config, table) for table in _ropes(config) if _kind(table) in BY_BATCH]
    return min(original) if original else max([longest, *(_scaled(longest, table) for table in _ropes(config))])


def check_lengths(model: Any, lengths: Sequence[int]) -> None:
    """Refuse rows that are longer than the model's context. Raises UserError."""
    limit = context_of(model.config)
    if limit is not None and lengths and max(lengths) > limit:
        raise UserError(
            f"a row of {max(lengths):,} tokens is longer than the {limit:,} that {type(model).__name__} was made for",
            remedy="cut rows with data.max_prompt_tokens and data.max_response_tokens",
            field="data",
        )


def _kind(table: Mapping[str, Any]) -> str:
    return str(table.get("rope_type", table.get("type", "default")))


def _original(longest: int, config: Any, table: Mapping[str, Any]) -> int:
    found = table.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(found or longest)


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """The tables of RoPE's settings; a model may have one for each kind of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        table = getattr(config, name, None)
        if isinstance(table, Mapping) and table:
            inner = [value for value in table.values() if isinstance(value, Mapping)]
            return inner or [table]
    return []


def _scaled(longest: int, table: Mapping[str, Any]) -> int:
    factor = table.get("factor")
    if _kind(table) in LONG_ALREADY or not isinstance(factor, int | float):
        return longest
    return int(factor * (table.get("original_max_position_embeddings") or longest))

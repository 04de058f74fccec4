"""How long a row a model was made for, read from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thence import recipe as recipes
from thence.errors import RecipeError
from thence.train.model import _options, _overridden, resolve

NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
LONG_ALREADY = ("default", "mrope", "llama3", "longrope", "su")
"""Kinds of RoPE whose `max_position_embeddings` is the length after scaling."""


def context_of(config: Any) -> int | None:
    """Most tokens that a model of this configuration was made for, prompt and response together; None: not told.

    Models without positions (Mamba) and with ALiBi (BLOOM, some Falcons) have no limit. Scaling of RoPE counts as vLLM
    counts it: times ``factor``, of ``original_max_position_embeddings`` where that is given.
    """
    config = getattr(config, "get_text_config", lambda: config)() or config
    if getattr(config, "alibi", False) is True:
        return None
    told = (getattr(config, name, None) for name in NAMES)
    longest = next((value for value in told if isinstance(value, int) and value > 0), None)
    if longest is None:
        return None
    return max([longest, *(_scaled(longest, table) for table in _ropes(config))])


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """The tables of RoPE's settings; a model may have one for each kind of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        table = getattr(config, name, None)
        if isinstance(table, Mapping) and table:
            inner = [value for value in table.values() if isinstance(value, Mapping)]
            return inner or [table]
    return []


def _scaled(longest: int, table: Mapping[str, Any]) -> int:
    kind, factor = table.get("rope_type", table.get("type", "default")), table.get("factor")
    if kind in LONG_ALREADY or not isinstance(factor, int | float):
        return longest
    return int(factor * (table.get("original_max_position_embeddings") or longest))


def open_config(settings: recipes.Model) -> Any:
    """The configuration of a recipe's model, with the recipe's overrides. Raises RecipeError."""
    from transformers import AutoConfig

    try:
        if settings.init is not None:
            return AutoConfig.for_model(**settings.init)
        config = AutoConfig.from_pretrained(resolve(settings.path or ""), **_options(settings))
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(
            f"cannot open {settings.path or settings.init}: {str(error).strip().splitlines()[0]}",
            remedy="give a Hugging Face folder with config.json, weights and tokenizer, or a reachable hub name",
            field="model.path",
        ) from error
    return _overridden(config, settings.config_overrides)

"""Models that start from random weights: their configuration, and whether they fit into this machine's memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from thence.errors import RecipeError

MOST_LAYERS = 4096
LARGEST = 10**8
"""Of any whole number in a configuration: sizes of vocabularies, layers and positions."""


def made_config(table: Mapping[str, Any]) -> Any:
    """The transformers configuration that ``model.init`` asks for. Raises RecipeError where there can be none."""
    from transformers import AutoConfig

    for name, value in table.items():
        _check_number(f"model.init.{name}", value, MOST_LAYERS if "layers" in name else LARGEST)
    if not isinstance(table.get("model_type"), str):
        raise _refused("model_type is missing", 'write init = { model_type = "llama", ... }', "model.init.model_type")
    try:
        return AutoConfig.for_model(**table)
    except Exception as error:  # a configuration's own checks raise what they like: ZeroDivisionError, TypeError ...
        raise _refused(f"transformers makes no configuration of it: {_said(error)}") from error


def check_size(config: Any, dtype: torch.dtype) -> None:
    """Make sure that the model can be made, and that its weights fit into memory. Raises RecipeError."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    except Exception as error:  # so do its layers
        raise _refused(f"transformers makes no model of it: {_said(error)}") from error
    needed, there = count * dtype.itemsize, _memory()
    if there is not None and needed > there:
        raise _refused(
            f"{count:,} parameters need {needed / 2**30:,.1f} GiB, and this machine has {there / 2**30:,.1f} GiB",
            "give smaller sizes, for example of hidden_size, num_hidden_layers and vocab_size",
        )


def _check_number(field: str, value: Any, most: int) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > most:
        raise _refused(f"{value:,} is more than {most:,}", "give a size that a model has", field)


def _refused(
    problem: str, remedy: str = "give the fields of a config.json of this model_type", field: str = "model.init"
) -> RecipeError:
    return RecipeError(problem, remedy=remedy, field=field)


def _said(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None

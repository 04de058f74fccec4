"""What is known of models and data sets without opening them: their own configuration, else their published shape."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from thence.accounting.flops import FAMILIES
from thence.toml import parse_toml


def public_architecture(name: str) -> dict[str, Any] | None:
    """The shape of a public model by hub name, for planning only; None when it is not listed."""
    for key, shape in published_table("architectures.toml").items():
        if name == key or name in shape.get("also", ()):
            return shape
    return None


def own_configuration(folder: Path) -> dict[str, Any] | None:
    """What a model's folder says of it; None: nothing that can be counted."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) and config.get("model_type") in FAMILIES else None


@cache
def published_table(name: str) -> dict[str, dict[str, Any]]:
    """A table of published facts that comes with thence, by its file's name. It is read once; nobody changes it."""
    return parse_toml((resources.files("thence.accounting") / name).read_text(encoding="utf-8"))

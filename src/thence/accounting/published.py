"""Published shapes of public models and sizes of public data sets, for plans only."""

from __future__ import annotations

from importlib import resources
from typing import Any

from thence.toml import parse_toml


def public_architecture(name: str) -> dict[str, Any] | None:
    """The shape of a public model by hub name, for planning only; None when it is not listed."""
    for key, shape in published_table("architectures.toml").items():
        if name == key or name in shape.get("also", ()):
            return shape
    return None


def published_table(name: str) -> dict[str, dict[str, Any]]:
    """A table of this folder: ``architectures.toml`` or ``data_sets.toml``."""
    return parse_toml((resources.files("thence.accounting") / name).read_text(encoding="utf-8"))

"""The test sets that an evaluation names."""

from __future__ import annotations

from typing import Any

from thence.recipe import Eval


def test_sets(stage: Eval) -> dict[str, dict[str, Any]]:
    """The named test sets of a stage, each as overrides of [data]."""
    own = {"split": "test", **stage.data}
    return {name: {**own, **table} for name, table in (stage.splits or {own["split"]: {}}).items()}

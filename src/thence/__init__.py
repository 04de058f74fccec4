"""thence: SFT, thence RL. Post-train language models to reason, correct by construction.

The names below are imported when first used, so that ``import thence`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thence.pipeline.run import run
    from thence.recipe import Recipe, load_recipe
    from thence.rollout.native import Sampling, sample
    from thence.train.trainer import Trainer

__version__ = "0.1.0"

_HOMES = {
    "Recipe": "thence.recipe",
    "Sampling": "thence.rollout.native",
    "Trainer": "thence.train.trainer",
    "load_recipe": "thence.recipe",
    "run": "thence.pipeline.run",
    "sample": "thence.rollout.native",
}

__all__ = ["Recipe", "Sampling", "Trainer", "__version__", "load_recipe", "run", "sample"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'thence' has no attribute {name!r}")

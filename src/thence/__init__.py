"""thence: SFT, thence RL. Post-train language models to reason, correct by construction.

The names below are imported when first used, so that ``import thence`` does not wait for torch.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from thence.cores import settle_waiting

if TYPE_CHECKING:
    from thence import audit
    from thence.recipe import Recipe, load_recipe
    from thence.recorded import RecordedRun as Run
    from thence.recorded import load_run, run
    from thence.rollout.native import Sampling, sample
    from thence.train.trainer import Trainer

__version__ = "0.1.0"

settle_waiting(os.environ, loaded="torch" in sys.modules)  # here, because everything of thence comes past before torch

_HOMES = {
    "Recipe": "thence.recipe:Recipe",
    "Run": "thence.recorded:RecordedRun",
    "Sampling": "thence.rollout.native:Sampling",
    "Trainer": "thence.train.trainer:Trainer",
    "audit": "thence.audit",
    "load_recipe": "thence.recipe:load_recipe",
    "load_run": "thence.recorded:load_run",
    "run": "thence.recorded:run",
    "sample": "thence.rollout.native:sample",
}

__all__ = ["Recipe", "Run", "Sampling", "Trainer", "__version__", "audit", "load_recipe", "load_run", "run", "sample"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module, _, inside = _HOMES[name].partition(":")
        home = importlib.import_module(module)
        return getattr(home, inside) if inside else home
    raise AttributeError(f"module 'thence' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

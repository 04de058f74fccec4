"""The model that a rollout batch is sampled from in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from thence.pipeline.context import StageContext
from thence.pipeline.sampler import SyncedEngine
from thence.train.weights import whole


@contextmanager
def sampled_from(context: StageContext, engine: SyncedEngine | None) -> Iterator[Any]:
    """The whole model that this process samples with; None where an engine samples, which gets the weights itself."""
    if engine is not None:
        yield None
        return
    with whole(context.policy) as model:
        yield model

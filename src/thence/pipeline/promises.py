"""What the stages of a run rely on, tried on the model at hand before the first step of the first of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from thence.pipeline.context import StageContext
from thence.recipe import Eval, Optimization, Rl
from thence.rollout.choice import choice_of
from thence.train.lora import has_adapters
from thence.train.probe import NotVerified, check_adapters, check_files, check_gradient
from thence.train.recompute import recompute
from thence.train.weights import skeleton_of, whole

log = logging.getLogger(__name__)
_tried: set[tuple[str, str, str]] = set()  # of this process, which may make many runs from one model


def hold(context: StageContext, names: Sequence[str]) -> None:
    """Try on the context's model what these stages need: gradients, packing, sampling, files that can be read again.

    What this machine has no room to try is said in the log. A run that has written a model or a checkpoint before does
    not try its files again.

    Raises:
        UserError: something does not hold.
    """
    # another model at the same place is another model: its configuration is part of what it is known by
    model = context.recipe.model.model_dump_json() + context.model.config.to_json_string()
    for part, act in _promises(context, names):
        key = (model, str(context.device), part)
        if key in _tried:
            continue
        try:
            act()
        except NotVerified as missing:
            log.warning("not verified: %s: %s", part, missing)
        _tried.add(key)


def _promises(context: StageContext, names: Sequence[str]) -> Iterator[tuple[str, Callable[[], object]]]:
    policy, model, stages = context.policy, context.model, [context.recipe.stage(name) for name in names]
    training = [stage for stage in stages if isinstance(stage, Optimization)]
    for packing in sorted({stage.packing for stage in training}):
        yield (
            f"gradient, {'packed' if packing else 'padded'} rows",
            lambda packing=packing: (
                check_adapters(policy, packing) if has_adapters(model) else check_gradient(model, packing)
            ),
        )
    for which in {stage.activation_checkpointing for stage in training} - {False}:
        yield f"activation checkpointing, {which}", lambda which=which: recompute(skeleton_of(model), which)
    if any(isinstance(stage, Eval) or (isinstance(stage, Rl) and stage.engine == "native") for stage in stages):
        yield "sampling", lambda: _of_plain(context, choice_of)
    if training and context.leads and not _has_written(context):
        trusted = context.recipe.model.trust_remote_code
        yield (
            "saving and resuming",
            lambda: _of_plain(context, lambda plain: check_files(plain, context.tokenizer, trusted)),
        )


def _of_plain(context: StageContext, check: Callable[[Any], object]) -> object:
    """Check the model that is sampled from and published: of one with adapters, the one that they are merged into."""
    with whole(context.policy) as plain:
        return check(plain)


def _has_written(context: StageContext) -> bool:
    stages = context.folder.path / "stages"
    return any(stages.glob("*/model/*")) or any(stages.glob("*/checkpoints/step-*"))

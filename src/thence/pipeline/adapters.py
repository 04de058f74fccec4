"""LoRA in a run: which stages train adapters, what is refused beforehand, and the adapter that a stage publishes."""

from __future__ import annotations

import shutil
from typing import Any

from thence.data.order import stable_seed
from thence.errors import RecipeError
from thence.pipeline.context import Context
from thence.recipe import Lora, Model, Optimization, Recipe
from thence.train.checkpoint import publish, removed_on_failure
from thence.train.lora import add_adapters, published_tensors, save_adapter, trained_tensors
from thence.train.model import empty_model
from thence.train.parallel import on_first_rank
from thence.train.policy import Policy
from thence.train.weights import skeleton_of

FOLDER = "adapter"


def lora_of(recipe: Recipe, name: str) -> Lora | None:
    """The adapters that a stage trains; None: it trains the weights, or nothing."""
    return recipe.model.lora if isinstance(recipe.stage(name), Optimization) else None


def adapt(policy: Policy, recipe: Recipe, name: str) -> None:
    """Give the policy of a stage its fresh adapters, if it trains any. What they follow from is the same on all ranks.

    Raises:
        RecipeError: adapters that this model cannot have.
        UserError: peft is not installed.
    """
    settings = lora_of(recipe, name)
    if settings is not None:
        policy.keep_skeleton(skeleton_of(policy.model))
        add_adapters(policy.model, settings, stable_seed(recipe.seed, name))


def check_lora(recipe: Recipe, name: str) -> None:
    """Refuse what does not go together with adapters. Raises RecipeError."""
    stage = recipe.stage(name)
    if recipe.model.lora is not None and isinstance(stage, Optimization) and stage.fault is not None:
        raise RecipeError(
            "faults are defined on the weights of a model, and adapters are trained instead of them",
            remedy="train with the fault and without model.lora, or without the fault",
            field=f"{name}.fault",
        )


def try_lora(settings: Model) -> str:
    """Put the adapters into the model without its weights. Returns what is trained, for a reader.

    Raises:
        RecipeError: adapters that this model cannot have.
        UserError: peft is not installed.
    """
    trained, every = sizes(settings)
    return f"{trained:,} of {every:,} parameters are trained"


def sizes(settings: Model, lora: Lora | None = None) -> tuple[int, int]:
    """How many parameters are trained, and how many there are, adapters included. No weight is read.

    Args:
        lora: the adapters; default: those of the settings. Without any, everything is trained.
    """
    model: Any = empty_model(settings)
    if (lora := lora or settings.lora) is not None:
        add_adapters(model, lora, 0)
    return sum(p.numel() for p in trained_tensors(model).values()), sum(p.numel() for p in model.parameters())


def publish_adapter(context: Context) -> None:
    """Write the adapter that a stage has trained, as peft writes it, whole or not at all. All ranks call it."""
    folder = context.folder.stage(context.name)
    temporary = folder / f".{FOLDER}-writing"
    tensors = dict(published_tensors(context.model))

    def write() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        with removed_on_failure(temporary):
            temporary.mkdir(parents=True)
            save_adapter(context.model, tensors, context.origin, temporary)
            publish(temporary, folder / FOLDER)

    on_first_rank(context.ranks, write)

"""LoRA in a run: which stages train adapters, what is refused beforehand, and the adapter that a stage publishes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from thence.errors import RecipeError, UserError
from thence.pipeline.context import StageContext
from thence.recipe import Lora, Model, Optimization, Recipe
from thence.train.adapted import is_quantized
from thence.train.checkpoint import publish, removed_on_failure
from thence.train.lora import add_adapters, published_tensors, save_adapter, trained_tensors
from thence.train.model import empty_model
from thence.train.model_files import resolve
from thence.train.parallel import Ranks, on_first_rank
from thence.train.quantized import check_quantizable, load_bitsandbytes, quantized_digest

FOLDER = "adapter"


def check_same_base(ranks: Ranks, model: Any) -> None:
    """Make sure that all ranks have quantized to the same bits. All of them call it. Raises UserError."""
    if len(set(ranks.gather(quantized_digest(model)))) > 1:
        raise UserError(
            "the ranks have quantized the weights to different bits, so they would train different policies",
            remedy="use machines of one kind with one version of bitsandbytes, or leave model.lora.quantize out",
            field="model.lora.quantize",
        )


def check_lora(recipe: Recipe, name: str) -> None:
    """Refuse what does not go together with adapters. Raises RecipeError."""
    stage = recipe.stage(name)
    if is_quantized(recipe, name):
        _check_quantized(recipe)
    if recipe.model.lora is not None and isinstance(stage, Optimization) and stage.fault is not None:
        raise RecipeError(
            "faults are defined on the weights of a model, and adapters are trained instead of them",
            remedy="train with the fault and without model.lora, or without the fault",
            field=f"{name}.fault",
        )


def _check_quantized(recipe: Recipe) -> None:
    """Refuse what nobody has verified of QLoRA. Raises RecipeError."""
    field = "model.lora.quantize"
    trained = [name for name in recipe.stages if isinstance(recipe.stage(name), Optimization)]
    if len(trained) > 1:
        raise RecipeError(
            f"{trained[1]} would quantize anew what {trained[0]} has left, and start from another policy",
            remedy="train one stage in a run, or leave model.lora.quantize out",
            field=field,
        )
    if recipe.parallel in ("fsdp2", "hsdp"):
        raise RecipeError(
            f"parallel = {recipe.parallel} cuts weights over ranks, and those in 4 bits cannot be cut",
            remedy='set parallel = "ddp" or "auto", or leave model.lora.quantize out',
            field="parallel",
        )
    if recipe.sharding.context > 1:
        raise RecipeError(
            "ranks that share rows have not been tried with weights in 4 bits",
            remedy="set sharding.context = 1, or leave model.lora.quantize out",
            field="sharding.context",
        )
    if recipe.model.compute_dtype == "float64":
        raise RecipeError(
            "NF4 is made from float32 weights, and compute_dtype = float64 keeps them in float64",
            remedy='set model.compute_dtype to "float32", "bfloat16" or "auto"',
            field="model.compute_dtype",
        )


def try_lora(settings: Model) -> str:
    """Put the adapters into the model without its weights. Returns what is trained, for a reader.

    Raises:
        RecipeError: adapters that this model cannot have.
        UserError: peft is not installed, or bitsandbytes where it is needed.
    """
    lora, model = settings.lora, empty_model(settings)
    if lora is not None:
        add_adapters(model, lora, 0)
    if lora is not None and lora.quantize is not None:
        load_bitsandbytes()
        check_quantizable(model)
    trained, every = _counted(model)
    return f"{trained:,} of {every:,} parameters are trained"


def sizes(settings: Model, lora: Lora | None = None) -> tuple[int, int]:
    """How many parameters are trained, and how many there are, adapters included. No weight is read.

    Args:
        lora: the adapters; default: those of the settings. Without any, everything is trained.
    """
    model: Any = empty_model(settings)
    if (lora := lora or settings.lora) is not None:
        add_adapters(model, lora, 0)
    return _counted(model)


def _counted(model: Any) -> tuple[int, int]:
    return sum(p.numel() for p in trained_tensors(model).values()), sum(p.numel() for p in model.parameters())


def origin_of(model: Model) -> str:
    """What a model is found by from anywhere: its folder, or its name on the hub; empty for random weights."""
    place = resolve(model.path) if model.path else ""
    return str(Path(place).absolute()) if place and Path(place).is_dir() else place


def publish_adapter(context: StageContext) -> None:
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

"""A stage that trains adapters (LoRA): which does, its policy, and the model in one of its checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch

from thence.data.order import stable_seed
from thence.errors import UserError
from thence.files import read_json
from thence.recipe import Eval, Lora, Model, Optimization, Recipe, load_recipe
from thence.train.export import STATE, check_free, check_source
from thence.train.lora import add_adapters
from thence.train.merge import write_plain
from thence.train.model import Loaded, load_model
from thence.train.policy import Policy
from thence.train.quantized import check_base, quantize
from thence.train.state import load_weights
from thence.train.weights import skeleton_of, whole


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
    if settings is None:
        return
    policy.keep_skeleton(skeleton_of(policy.model))
    add_adapters(policy.model, settings, stable_seed(recipe.seed, name))
    if settings.quantize is not None:
        quantize(policy.model)


def is_quantized(recipe: Recipe, name: str) -> bool:
    """Whether a stage trains adapters over weights that are kept in 4 bits."""
    settings = lora_of(recipe, name)
    return settings is not None and settings.quantize is not None


def started_from(recipe: Recipe, run: Path, name: str) -> Model:
    """The model that a stage starts from: the one that the training stage before it has left, or the recipe's."""
    before, model = recipe.stages[: recipe.stages.index(name)], recipe.model
    trained = [other for other in before if not isinstance(recipe.stage(other), Eval)]
    if not trained:
        return model
    return Model(
        path=str(run / "stages" / trained[-1] / "model"),
        compute_dtype=model.compute_dtype,
        trust_remote_code=model.trust_remote_code,
    )


def merge_checkpoint(checkpoint: Path, folder: Path) -> Path:
    """What the checkpoint of a stage that trains adapters holds, merged into the model that the stage started from.

    Args:
        checkpoint: in its place in the run.
        folder: not there yet, or empty.

    Raises:
        UserError: the folder holds files; the checkpoint has no adapters, or lies elsewhere than in a run.
        DamagedFile: a file of the checkpoint is not as it was written.
        CheckpointError: it is not of this model.
    """
    place = check_free(folder)
    check_source(checkpoint)
    stage, run = checkpoint.absolute().parent.parent, checkpoint.absolute().parents[3]
    recipe = load_recipe(run / "recipe.toml") if (run / "recipe.toml").is_file() else None
    if recipe is None or stage.name not in recipe.stages or lora_of(recipe, stage.name) is None:
        raise UserError(
            "this is no checkpoint of a run that trains adapters",
            remedy="give the folder of an adapter, or such a run; `thence export` takes other checkpoints",
            file=checkpoint,
        )
    loaded = load_model(started_from(recipe, run, stage.name), torch.device("cpu"), recipe.seed)
    policy = Policy(loaded.model)
    adapt(policy, recipe, stage.name)
    state = read_json(checkpoint / STATE, remedy="merge another checkpoint")
    check_base(policy.model, state.get("quantized"), checkpoint)
    load_weights(policy.model, checkpoint)
    stops = state.get("stops")
    with whole(policy) as model:
        if stops:  # as `thence run` does when it publishes a model
            model.generation_config.eos_token_id = stops
        return write_plain(Loaded(model, loaded.tokenizer, loaded.origin), place)

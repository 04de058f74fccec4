"""How the ranks of a run share a training stage: one device, whole copies, or weights cut over ranks."""

from __future__ import annotations

import logging
import os

import torch

from thence.errors import RecipeError
from thence.models.packing import know_way, way_of
from thence.pipeline.adapters import lora_of, sizes
from thence.pipeline.context import Context, Layout
from thence.recipe import Model, Optimization, Recipe
from thence.train.cut_probe import Sums, check_cut, gradient_sums
from thence.train.model import Loaded, compute_dtype, empty_model, load_model, load_tokenizer
from thence.train.parallel import DataParallel, Ranks, Sharding, on_first_rank, shard, together
from thence.train.policy import Policy
from thence.train.probe import NotVerified
from thence.train.weights import skeleton_of

log = logging.getLogger(__name__)
FITS = 0.6  # of a device's memory for weights, gradients and moments; the rest is for activations


def check_layout(recipe: Recipe, world: int) -> None:
    """Refuse a layout that so many ranks cannot have. Raises RecipeError."""
    kind, replicas = recipe.parallel, recipe.sharding.replicas
    if kind == "none" and world > 1:
        raise RecipeError(
            f"parallel = none, but {world} processes were started",
            remedy='start one process, or set parallel = "auto"',
            field="parallel",
        )
    if kind == "hsdp" and (replicas < 2 or world % replicas):
        raise RecipeError(
            f"{world} ranks cannot be dealt to {replicas} replicas of two or more",
            remedy="give 2 or more replicas, a divisor of the number of ranks",
            field="sharding.replicas",
        )
    if kind != "hsdp" and replicas > 1:
        raise RecipeError(
            f"parallel = {kind} has no replicas", remedy='set parallel = "hsdp"', field="sharding.replicas"
        )


def layout_of(recipe: Recipe, name: str, settings: Model, ranks: Ranks, device: torch.device) -> Layout:
    """The layout of a stage. Evaluations sample from whole copies; ``auto`` cuts what a device cannot hold whole."""
    if not isinstance(recipe.stage(name), Optimization):
        return "ddp" if ranks.world > 1 else "none"
    if recipe.parallel != "auto":
        return "none" if ranks.world == 1 and recipe.parallel == "ddp" else recipe.parallel
    if ranks.world == 1:
        return "none"
    width = 8 if settings.compute_dtype == "float64" else 4
    trained, every = sizes(settings, lora_of(recipe, name))
    need = width * (every + 3 * trained)  # weights, and a gradient and two moments of what is trained
    room = FITS * memory_of(device)
    kind: Layout = "ddp" if need <= room else "fsdp2"
    if ranks.rank == 0:
        log.info(
            "parallel = %s: training state takes %.1f GB, a device has room for %.1f", kind, need / 1e9, room / 1e9
        )
    return ranks.gather(kind)[0]  # free memory may differ between machines; the first rank decides


def open_model(settings: Model, layout: Layout, ranks: Ranks, device: torch.device, seed: int) -> Loaded:
    """The model on every rank; where it will be cut, on the first rank's host alone, and without weights elsewhere.

    Raises:
        RecipeError: no such model or tokenizer.
        UserError: a model that thence cannot train; where it will be cut, the first rank has found it so.
    """
    if not is_cut(layout):
        return load_model(settings, device, seed)
    opened = on_first_rank(ranks, lambda: load_model(settings, torch.device("cpu"), seed))
    found = together(ranks, lambda: opened or empty_model_with_tokenizer(settings))
    found.model.generation_config = ranks.gather(found.model.generation_config)[0]
    return found


def empty_model_with_tokenizer(settings: Model) -> Loaded:
    """What a rank holds that gets its weights from the first one."""
    return Loaded(empty_model(settings), load_tokenizer(settings), settings.path or "random weights")


def is_cut(layout: Layout) -> bool:
    """Whether a rank holds a part of every weight."""
    return layout in ("fsdp2", "hsdp")


def cut(context: Context, packing: bool) -> None:
    """Cut the context's policy over ranks. The context has other ranks then.

    Args:
        packing: whether rows will be packed; how is found on the whole model.

    Raises:
        UserError: the model cannot be cut or packed.
    """
    ranks = context.ranks
    expected = on_first_rank(ranks, lambda: _sums_or_none(context.policy))
    if packing:
        way = on_first_rank(ranks, lambda: way_of(context.model))
        know_way(context.model, ranks.gather(way)[0])
    if context.policy.skeleton is None:  # that of a policy with adapters was kept before it had them
        context.policy.keep_skeleton(skeleton_of(context.model))
    context.ranks = cut_policy(context.policy, context.recipe, ranks, context.device)
    sums = ranks.gather(expected)[0]
    if sums is not None:
        check_cut(context.policy, context.ranks, sums, compute_dtype(context.recipe.model, context.device))


def _sums_or_none(policy: Policy) -> Sums | None:
    try:
        return gradient_sums(policy)
    except NotVerified as missing:
        log.warning("not verified: the gradient of the cut model: %s", missing)
        return None


def cut_policy(policy: Policy, recipe: Recipe, ranks: Ranks, device: torch.device) -> Ranks:
    """Cut a policy as the recipe says. Returns the ranks to train it with."""
    settings = recipe.sharding
    sharding = Sharding(
        replicas=settings.replicas,
        compute_dtype=compute_dtype(recipe.model, device),
        reshard_after_forward=settings.reshard_after_forward,
        sum_every_pass=settings.sum_every_pass,
        offload=settings.offload,
    )
    return shard(policy, ranks if isinstance(ranks, DataParallel) else DataParallel.alone(device), sharding)


def memory_of(device: torch.device) -> float:
    """Bytes that a rank has: of its GPU, or its share of this machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / max(local, 1)

"""How the ranks of a run share a training stage: one device, whole copies, or weights cut over ranks."""

from __future__ import annotations

import logging
import os

import torch

from thence.accounting.layout import FITS, Layout, choose_layout, is_cut, weight_bytes
from thence.errors import RecipeError
from thence.models.packing import know_way, way_of
from thence.pipeline.adapters import sizes
from thence.pipeline.context import StageContext
from thence.recipe import Model, Optimization, Recipe
from thence.train.adapted import is_quantized, lora_of
from thence.train.cut_probe import Sums, check_cut, gradient_sums
from thence.train.model import Loaded, compute_dtype, empty_model, load_model, load_tokenizer
from thence.train.parallel import DataParallel, Ranks, ShardLayout, on_first_rank, shard, together
from thence.train.policy import Policy
from thence.train.probe import NotVerified
from thence.train.weights import skeleton_of

log = logging.getLogger(__name__)


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
    context = recipe.sharding.context
    if world % context:
        raise RecipeError(
            f"{world} ranks cannot be dealt to groups of {context} that share rows",
            remedy="set sharding.context to a divisor of the number of ranks",
            field="sharding.context",
        )
    for name in recipe.stages:
        stage = recipe.stage(name)
        if context > 1 and isinstance(stage, Optimization) and not stage.packing:
            raise RecipeError(
                f"sharding.context = {context} cuts packed rows, and those of stage {name} are padded",
                remedy=f"set {name}.packing = true",
                field=f"{name}.packing",
            )


def layout_of(recipe: Recipe, name: str, settings: Model, ranks: Ranks, device: torch.device) -> Layout:
    """The layout of a stage. Evaluations sample from whole copies; ``auto`` cuts what a device cannot hold whole."""
    if not isinstance(recipe.stage(name), Optimization):
        return "ddp" if ranks.world > 1 else "none"
    if is_quantized(recipe, name) and recipe.parallel == "auto":  # which cannot be cut
        return choose_layout("ddp", ranks.world, 0, 0)
    need, room = 0, memory_of(device)
    sized = recipe.parallel == "auto" and ranks.world > 1
    if sized:  # weights, and a gradient and two moments of what is trained
        trained, every = sizes(settings, lora_of(recipe, name))
        need = weight_bytes(settings.compute_dtype) * (every + 3 * trained)
    kind = choose_layout(recipe.parallel, ranks.world, need, room)
    if not sized:
        return kind
    if ranks.rank == 0:
        log.info(
            "parallel = %s: training state takes %.1f GB, a device has room for %.1f",
            kind,
            need / 1e9,
            FITS * room / 1e9,
        )
    return ranks.gather(kind)[0]  # free memory may differ between machines; the first rank decides


def open_model(settings: Model, layout: Layout, ranks: Ranks, device: torch.device, seed: int) -> Loaded:
    """The model on every rank; where it will be cut, on the first rank's host alone, and without weights elsewhere.

    Raises:
        RecipeError: no such model or tokenizer.
        UserError: a model that thence cannot train; where it will be cut, the first rank has found it so.
    """
    if not is_cut(layout):
        return together(ranks, lambda: load_model(settings, device, seed))
    opened = on_first_rank(ranks, lambda: load_model(settings, torch.device("cpu"), seed))
    found = together(ranks, lambda: opened or empty_model_with_tokenizer(settings))
    found.model.generation_config = ranks.gather(found.model.generation_config)[0]
    return found


def empty_model_with_tokenizer(settings: Model) -> Loaded:
    """What a rank holds that gets its weights from the first one."""
    return Loaded(empty_model(settings), load_tokenizer(settings), settings.path or "random weights")


def cut(context: StageContext, packing: bool) -> None:
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


def check_pieces(context: StageContext) -> None:
    """Where ranks share rows but not weights: make sure that they get the gradient of one process.

    Raises:
        UserError: they do not, or the model's rows cannot be cut.
    """
    ranks = context.ranks
    if ranks.context is None or not isinstance(context.recipe.stage(context.name), Optimization):
        return
    sums = ranks.gather(together(ranks, lambda: _sums_or_none(context.policy)))
    expected = sums[0]
    if expected is not None and None not in sums:
        dtype = compute_dtype(context.recipe.model, context.device)
        together(ranks, lambda: check_cut(context.policy, ranks, expected, dtype))


def _sums_or_none(policy: Policy) -> Sums | None:
    try:
        return gradient_sums(policy)
    except NotVerified as missing:
        log.warning("not verified: the gradient of the model or of rows that are cut: %s", missing)
        return None


def cut_policy(policy: Policy, recipe: Recipe, ranks: Ranks, device: torch.device) -> Ranks:
    """Cut a policy as the recipe says. Returns the ranks to train it with."""
    settings = recipe.sharding
    sharding = ShardLayout(
        replicas=settings.replicas,
        compute_dtype=compute_dtype(recipe.model, device),
        reshard_after_forward=settings.reshard_after_forward,
        sum_every_pass=settings.sum_every_pass,
        offload=settings.offload,
    )
    return shard(policy, ranks if isinstance(ranks, DataParallel) else DataParallel.alone(device), sharding)


def own_device() -> torch.device:
    """Where this process would compute."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def memory_of(device: torch.device, local: int | None = None) -> float:
    """Bytes that a rank has: of its GPU, or its share of this machine's.

    Args:
        local: processes on this machine; default: those that were started.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if local is None:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / max(local, 1)

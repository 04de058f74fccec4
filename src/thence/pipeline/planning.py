"""What a plan is told of a recipe: its model, its data if they are at hand, its methods; and what is refused."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from thence.accounting.budget import plan
from thence.accounting.choices import heads_go
from thence.accounting.hardware import Hardware
from thence.accounting.memory import Reference
from thence.accounting.planned import Plan
from thence.accounting.work import Work
from thence.data.trajectory import Prompt
from thence.errors import RecipeError, UserError
from thence.files import read_json
from thence.methods.registry import stage_method
from thence.objective import compares, distils
from thence.pipeline.adapters import check_lora
from thence.pipeline.layout import check_layout
from thence.pipeline.prompts import RenderedPrompts
from thence.pipeline.rl_stage import check_settings, mini_batches_of
from thence.recipe import Eval, Recipe, Rl, Sft
from thence.train.model import load_tokenizer
from thence.train.model_files import resolve


def facts_of(recipe: Recipe) -> dict[str, Any]:
    """What :func:`thence.accounting.budget.plan` is told of model and methods, without those that cannot be made.

    Raises:
        DamagedFile: the model's configuration cannot be read.
    """
    references: dict[str, Reference] = {}
    teachers: dict[str, str] = {}
    works: dict[str, Work] = {}
    passes: dict[str, float] = {}
    for name in recipe.stages:
        stage = recipe.stage(name)
        with suppress(UserError):
            if isinstance(stage, Sft | Rl):
                method = stage_method(stage, name)
                whole = compares(method.terms) or distils(method.terms)
                if method.reference_passes or whole:
                    references[name] = Reference(method.reference_passes, whole)
                if method.teacher is not None:
                    teachers[name] = method.teacher.weights
                if isinstance(stage, Rl):
                    passes[name] = method.own_passes(mini_batches_of(stage), stage.importance_bound is not None)
                    if method.states_work:
                        works[name] = method.work(stage.prompts, stage.rollouts)
    told = {"references": references, "teachers": teachers, "works": works, "passes": passes}
    return {"config": _config(recipe), **told}


def measured_lengths(recipe: Recipe, prompts: RenderedPrompts) -> dict[str, Any]:
    """Lengths of the training data, which are rendered where they have not been.

    Raises:
        UserError: data or tokenizer are not at hand.
    """
    training = [recipe.stage(name) for name in recipe.stages if not isinstance(recipe.stage(name), Eval)]
    data = recipe.stage_data(training[0].data if training else {})
    return lengths_of(prompts.load(data, load_tokenizer(recipe.model)))


def lengths_of(rows: Sequence[Prompt]) -> dict[str, Any]:
    """How many rows there are, and how long, as :func:`thence.accounting.budget.plan` is told."""
    responses = [len(p.demonstration_ids) for p in rows if p.demonstration_ids]
    return {
        "n_examples": len(rows),
        "mean_prompt_tokens": sum(len(p.token_ids) for p in rows) / len(rows),
        "mean_response_tokens": sum(responses) / len(responses) if responses else None,
        "longest_prompt_tokens": max(len(p.token_ids) for p in rows),
        "longest_row_tokens": max(len(p.token_ids) + len(p.demonstration_ids or ()) for p in rows),
    }


def check_shape(recipe: Recipe, ranks: int) -> None:
    """Refuse what a run on so many ranks would refuse for its settings alone. Raises UserError."""
    check_layout(recipe, ranks)
    for name in recipe.stages:
        stage = recipe.stage(name)
        if isinstance(stage, Sft | Rl):
            stage_method(stage, name)
            check_lora(recipe, name)
            if stage.fault is not None and ranks > 1:
                raise RecipeError(
                    "a fault plays all ranks in one process, but several processes share the step",
                    remedy="plan for a single device, and give the number of ranks to the fault",
                    field=f"{name}.fault",
                )
        if isinstance(stage, Rl):
            check_settings(name, stage, ranks)


def check_heads(recipe: Recipe, made: Plan) -> None:
    """Refuse ranks that share rows of a model whose heads cannot be dealt to them. Raises RecipeError."""
    counts, context = made.counts, recipe.sharding.context
    if counts is not None and context > 1 and not heads_go(counts, context):
        raise RecipeError(
            f"{counts.heads} attention heads ({counts.kv_heads} for keys and values) cannot be dealt evenly to "
            f"{context} ranks",
            remedy="set sharding.context to a divisor of the number of heads",
            field="sharding.context",
        )


def refusal(recipe: Recipe, hardware: Hardware) -> str:
    """Why a run would refuse the recipe on this hardware for its settings; "": it would not."""
    try:
        check_shape(recipe, hardware.ranks)
    except UserError as error:
        return str(error)
    return ""


def plan_for(recipe: Recipe, hardware: Hardware, facts: dict[str, Any]) -> Plan:
    """The plan on given hardware.

    Args:
        facts: further arguments of :func:`thence.accounting.budget.plan`.
    """
    device = hardware.device
    size = None
    if recipe.model.compute_dtype == "auto" and not device.on_host:
        size = 2 if device.peak_of(2) is not None else 4
    made = plan(
        recipe, **facts, ranks=hardware.ranks, device_bytes=device.memory, compute_bytes=size, on_host=device.on_host
    )
    if size is not None:
        said = f"compute_dtype auto is {'bfloat16' if size == 2 else 'float32'} on {device.name}"
        made = replace(made, assumptions=(said, *made.assumptions))
    return made


def with_own_memory(hardware: Hardware) -> Hardware:
    """The hardware, where its devices are processes of this machine with their share of its memory."""
    if not hardware.device.on_host or hardware.device.memory is not None:
        return hardware
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return replace(hardware, device=replace(hardware.device, memory=whole / hardware.per_node))


def _config(recipe: Recipe) -> dict[str, Any] | None:
    """The configuration of a model in thence or in an installed package; the plan finds others itself."""
    path = recipe.model.path or ""
    file = Path(resolve(path)) / "config.json" if path.startswith(("world:", "package:")) else None
    remedy = "give a folder whose config.json is whole"
    return read_json(file, remedy=remedy) if file is not None and file.exists() else None

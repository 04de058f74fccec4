"""Executing a recipe: its stages in order, each from where the last one left the model, resumable at any moment."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from thence.accounting.layout import is_cut
from thence.data.trajectory import Prompt
from thence.errors import UserError
from thence.methods.registry import stage_method
from thence.pipeline.adapters import check_same_base, origin_of, publish_adapter
from thence.pipeline.context import StageContext
from thence.pipeline.eval_stage import run_eval
from thence.pipeline.folder import RunFolder, last_trained
from thence.pipeline.foreseen import PeakMemory, foresee, keep, keep_peak
from thence.pipeline.ground import Ground, published, say_what_differs
from thence.pipeline.layout import check_layout, check_pieces, cut, cut_policy, layout_of, open_model
from thence.pipeline.numerics import settle_threads
from thence.pipeline.preflight import preflight, refuse
from thence.pipeline.progress import NullWatcher, ProgressFile, RunWatcher
from thence.pipeline.promises import hold
from thence.pipeline.prompts import RenderedPrompts
from thence.pipeline.rl_stage import run_rl
from thence.pipeline.saving import refuse_what_is_broken
from thence.pipeline.sft_stage import run_sft
from thence.pipeline.test_sets import test_sets
from thence.pipeline.trackers import Tracking, tracked
from thence.pipeline.validation import best_metric, take_best
from thence.recipe import Eval, Optimization, Recipe, Rl, Sft, load_recipe, naming_fields_of
from thence.train.adapted import adapt, is_quantized, started_from
from thence.train.checkpoint import publish, remove_checkpoints, removed_on_failure
from thence.train.lora import has_adapters
from thence.train.model import save_model
from thence.train.parallel import Ranks, on_first_rank, sharing_rows, start_ranks, together
from thence.train.policy import Policy
from thence.train.weights import whole

log = logging.getLogger(__name__)


def run(
    recipe: Recipe | str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    watcher: RunWatcher | None = None,
    restart: bool = False,
    repeat: Sequence[str] = (),
    keep_last: bool = True,
    prompts: RenderedPrompts | None = None,
) -> Path:
    """Run a recipe, or resume it where it was. All that it names is tried before its first step.

    Only one process writes into a run folder at a time. A setting that may change when a run is resumed, and what
    follows, is told by :mod:`thence.pipeline.changes`.

    Args:
        recipe: a recipe, or what :func:`thence.recipe.load_recipe` takes.
        overrides: dotted names to values, laid over it.
        watcher: is told of progress; nobody when absent.
        restart: remove what thence wrote of an earlier run in the folder.
        repeat: stages that are done or begun, to be set aside and run again. A stage after one of them stays as it is
            where it starts from the same bits, and is repeated where it does not.
        keep_last: keep the last checkpoint of the last training stage, from which it can be given more steps. Where
            the stage has keep_every, keep_last, keep_best or stop, it stays in any case.
        prompts: data tables that runs before have rendered; those of this run are added.

    Returns:
        The run folder.

    Raises:
        UserError: something that the user can fix; what was written before stands.
    """
    resolved = recipe if isinstance(recipe, Recipe) and not overrides else load_recipe(_plain(recipe), overrides)
    ranks, device = start_ranks()
    together(ranks, lambda: check_layout(resolved, ranks.world))
    ranks = sharing_rows(ranks, resolved.sharding.context)
    folder = RunFolder(resolved.run_folder())
    execution = Execution(resolved, folder, ranks, device, watcher or NullWatcher(), prompts or RenderedPrompts())

    def tried() -> None:
        again = {"restart": restart, "repeat": repeat, "prompts": execution.prompts}
        refuse(preflight(resolved, folder.path, ranks.world, leads=execution.leads, **again))

    def begin() -> None:
        held.enter_context(folder.held())
        settle_threads({} if restart else folder.first_start())
        if not restart:
            say_what_differs(folder, str(device), ranks.world)
        folder.open(resolved, str(device), method_labels(resolved), ranks.world, restart=restart, repeat=repeat)

    with ExitStack() as held:
        on_first_rank(ranks, folder.refuse_if_held)
        execution.told.doing("trying what the recipe names")
        together(ranks, tried)
        on_first_rank(ranks, begin)
        told, progress = execution.told, None
        to_go = [name for name in resolved.stages if not folder.is_done(name)] if execution.leads else []
        if execution.leads:
            told = progress = ProgressFile(told, folder.path)
            progress.begin(resolved.name, to_go)
        told = held.enter_context(tracked(resolved, folder.path, told, execution.leads))
        execution = replace(execution, watcher=told)
        _tell_plan(execution, to_go)
        memory = PeakMemory(device)
        kept = last_trained(resolved)
        if kept is not None and not keep_last and not _keeps(resolved, kept):
            kept = None  # where older ones stay, the newest does too: a longer run never resumes from an older one
        for name in resolved.stages:
            on_first_rank(ranks, lambda name=name: Ground(resolved, folder).set_outdated_aside(name))
            if not together(ranks, lambda name=name: folder.is_done(name)):
                memory.begin()
                run_stage(execution, name)
                if execution.leads:
                    keep_peak(folder.path, name, memory.end())
            place, keep = folder.stage(name) / "checkpoints", _newest_that_stay(resolved, name) or int(name == kept)
            # killed before this line, the next start comes to it
            on_first_rank(ranks, lambda place=place, keep=keep: remove_checkpoints(place, keep=keep))
        if progress is not None and to_go:
            progress.end()
    return folder.path


def _tell_plan(execution: Execution, stages: Sequence[str]) -> None:
    """Say what the stages to go are planned to cost, and keep it beside the run."""
    if not execution.leads or not stages:
        return
    found = foresee(execution.recipe, stages, execution.prompts, execution.ranks.world, execution.device)
    if found is not None:
        keep(execution.folder.path, found)
        execution.told.planned(found)


def _keeps(recipe: Recipe, name: str) -> bool:
    """Whether a stage is asked to keep checkpoints once it is done."""
    stage = recipe.stage(name)
    return isinstance(stage, Optimization) and any((stage.keep_every, stage.keep_last, best_metric(stage)))


def _newest_that_stay(recipe: Recipe, name: str) -> int:
    """How many of a stage's newest checkpoints stay once it is done, whatever stage it is."""
    stage = recipe.stage(name)
    return stage.keep_last or 0 if isinstance(stage, Optimization) else 0


def method_labels(recipe: Recipe) -> dict[str, str]:
    """What reports call the method of each training stage; one that is reconstructed says so, and so does a fault."""
    labels = {}
    for name in recipe.stages:
        stage = recipe.stage(name)
        if isinstance(stage, Sft | Rl):
            method = stage_method(stage, name)
            made_up = method.exactness_with(stage.options) == "reconstruction"
            labels[name] = stage.method + (" (reconstruction)" if made_up else "")
            if stage.fault is not None:
                labels[name] += f" with {' and '.join(stage.fault.names)}"
    return labels


@dataclass(frozen=True)
class Execution:
    """A recipe being run: by whom, into which folder, who is told, and the data tables that are rendered."""

    recipe: Recipe
    folder: RunFolder
    ranks: Ranks
    device: torch.device
    watcher: RunWatcher
    prompts: RenderedPrompts

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.ranks.rank == 0

    @property
    def told(self) -> RunWatcher:
        """The watcher, on the first rank; elsewhere one that shows nothing."""
        return self.watcher if self.leads else NullWatcher()

    def context(self, name: str) -> StageContext:
        """What a stage is given, with the model as the stages before it left it."""
        recipe = self.recipe
        model = started_from(recipe, self.folder.path, name)
        layout = layout_of(recipe, name, model, self.ranks, self.device)
        quantized = is_quantized(recipe, name)
        # quantized on the host, so that a GPU never holds the weights in float32
        where = torch.device("cpu") if quantized else self.device
        loaded = open_model(model, layout, self.ranks, where, recipe.seed)

        policy = Policy(loaded.model)
        together(self.ranks, lambda: adapt(policy, recipe, name))
        if quantized:
            check_same_base(self.ranks, policy.model)
            policy.to(self.device)
            if self.device.type != "cpu" and self.leads:
                log.warning("not verified: QLoRA has been run on CPUs alone, and never on a device like this one")

        def reopen() -> Policy:
            again = Policy(open_model(model, layout, self.ranks, self.device, recipe.seed).model.requires_grad_(False))
            cut_policy(again, recipe, self.ranks, self.device)
            return again

        return StageContext(
            recipe=recipe,
            name=name,
            folder=self.folder,
            policy=policy,
            layout=layout,
            reopen=reopen,
            tokenizer=loaded.tokenizer,
            ranks=self.ranks,
            device=self.device,
            watcher=self.told,
            prompts=self.prompts,
            origin=origin_of(model),
        )


def run_stage(execution: Execution, name: str) -> None:
    """Run one stage to its end and mark it done."""
    recipe, folder, leads = execution.recipe, execution.folder, execution.leads
    execution.told.doing(f"{name}: opening the model")
    context, stage = execution.context(name), recipe.stage(name)
    to_come = recipe.stages[recipe.stages.index(name) :]
    execution.told.doing(f"{name}: checking gradients, sampling and checkpoints with this model, and reading the data")
    if is_cut(context.layout):
        on_first_rank(execution.ranks, lambda: hold(context, to_come))
        cut(context, isinstance(stage, Optimization) and stage.packing)
    else:
        together(execution.ranks, lambda: hold(context, to_come))
        check_pieces(context)
    on_first_rank(execution.ranks, lambda: Ground(recipe, folder).begin(name, rendered(context, stage)))
    try:
        with naming_fields_of(name, stage):
            facts = run_kind(context, stage)
    except UserError as error:
        if leads and error.problem.startswith(("reward function ", "environment ")):
            Ground(recipe, folder).reward_failed(name)
        raise
    if not isinstance(stage, Eval):
        take_best(context, facts)
        publish_model(context, stage)
        # an adapter over quantized weights is wrong over those that everybody else has
        if has_adapters(context.model) and not is_quantized(recipe, name):
            publish_adapter(context)

    def finish() -> None:
        model = {} if isinstance(stage, Eval) else {"model": published(folder.stage(name) / "model")}
        folder.finish(name, {**facts, **model})
        if isinstance(stage, Eval) and isinstance(execution.watcher, Tracking):
            execution.watcher.results(name, folder.stage(name) / "result.json")

    on_first_rank(execution.ranks, finish)


def run_kind(context: StageContext, stage: Sft | Rl | Eval) -> dict[str, Any]:
    """Run a stage by its kind. Returns facts for ``done.json``."""
    if isinstance(stage, Sft):
        return run_sft(context, stage)
    return run_rl(context, stage) if isinstance(stage, Rl) else run_eval(context, stage)


def rendered(context: StageContext, stage: Sft | Rl | Eval) -> dict[str, list[Prompt]]:
    """The data tables of a stage by name, as its model sees them."""
    tables = test_sets(stage) if isinstance(stage, Eval) else {"data": stage.data}
    return {name: context.load_prompts(table) for name, table in tables.items()}


def publish_model(context: StageContext, stage: Sft | Rl) -> None:
    """Write the stage's final model, whole or not at all, with what ``generate`` needs to stop. All ranks call it.

    Raises:
        StepRefused: the model is not finite.
    """
    refuse_what_is_broken(context, "at the end")
    folder = context.folder.stage(context.name)
    temporary = folder / ".model-writing"

    def write(model: Any) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        with removed_on_failure(temporary):
            temporary.mkdir(parents=True)
            stops = context.stop_ids(context.recipe.stage_data(stage.data))
            model.generation_config.eos_token_id = list(stops)
            save_model(model, context.tokenizer, temporary)
            publish(temporary, folder / "model")

    with whole(context.policy, first_rank_only=True) as model:
        on_first_rank(context.ranks, lambda: write(model))


def _plain(recipe: Recipe | str | Path | Mapping[str, Any]) -> str | Path | Mapping[str, Any]:
    return recipe.resolved() if isinstance(recipe, Recipe) else recipe

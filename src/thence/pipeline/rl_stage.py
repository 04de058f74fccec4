"""The stage that trains on the policy's own responses: its loop over rollout batches."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from thence.errors import RecipeError
from thence.methods.base import Method
from thence.methods.registry import stage_method
from thence.methods.unknown import leave_out
from thence.models.lengths import context_of
from thence.pipeline.ahead import Ahead, check_ahead, sharing_cores
from thence.pipeline.context import Budget, StageContext, budget_of, make_trainer
from thence.pipeline.dealing import resume_position, same_or_each
from thence.pipeline.due import DueBatch
from thence.pipeline.engines_ahead import EngineAhead, sampling_child
from thence.pipeline.lessons import Watch
from thence.pipeline.partial import Partial, check_partial
from thence.pipeline.prompts import check_answers
from thence.pipeline.rewards import reward_names, stage_reward
from thence.pipeline.rl_metrics import SAMPLES_KEPT, BatchMetrics, keep_samples, stale_facts
from thence.pipeline.rl_update import Update
from thence.pipeline.rollout_engine import engine_of
from thence.pipeline.rollout_places import ranks_per_engine
from thence.pipeline.room import response_tokens
from thence.pipeline.sampled_from import sampled_from
from thence.pipeline.sampler import RolloutSampler
from thence.pipeline.saving import Checkpoints, naming_step, saving
from thence.pipeline.teacher import check_teacher, drawn_prompts, teacher_pass, teacher_weights
from thence.pipeline.validation import Validation
from thence.recipe import Rl
from thence.rollout.vllm.settings import vllm_settings
from thence.train.trainer import Trainer

log = logging.getLogger(__name__)
ONE_STEP = (
    "the bound of {0} cannot act while a rollout batch has one optimizer step: the policy has not moved. "
    "Set {2}.mini_batch to a part of the {1} prompts, for example a quarter"
)


def run_rl(context: StageContext, stage: Rl) -> dict[str, Any]:
    """Train the context's model on its own graded responses. Returns facts for ``done.json``."""
    prompts = context.load_prompts(stage.data)
    check_answers(prompts, reward_names(stage))
    if stage.rewards and context.leads and stage.reward not in (Rl.model_fields["reward"].default, *stage.rewards):
        log.warning("%s: reward = %r is not used, since rewards is set", context.name, stage.reward)
    prompts = drawn_prompts(stage_method(stage, context.name), prompts, context.name, say=context.leads)
    room = response_tokens(context.name, stage, prompts, context_of(context.model.config), say=False)
    method = stage_method(stage, context.name, room)
    check_settings(context.name, stage, context.ranks.world)
    check_ahead(context.name, stage, method, context.recipe.model.trust_remote_code)
    check_partial(context.name, stage, method)
    check_teacher(context.recipe, context.name, method)
    minis = mini_batches_of(stage)
    if method.needs_several_steps and minis == 1 and context.leads:
        log.warning("%s: %s", context.name, ONE_STEP.format(stage.method, stage.prompts, context.name))
    reference = context.frozen_policy() if method.reference_passes else None
    scorer = teacher_weights(context, method)
    trainer = make_trainer(context, stage, stage.steps * minis, reference)
    teacher = teacher_pass(context, stage, method, trainer, scorer)
    with ExitStack() as held:
        threads = held.enter_context(sharing_cores(context, stage))
        checkpoints = held.enter_context(saving(context, trainer, stage, stage.steps))
        done, own = checkpoints.resume()
        validation = Validation(context, stage, held)
        validation.resume(own)
        chat = context.chat(context.recipe.stage_data(stage.data))
        grader = held.enter_context(stage_reward(stage, chat))
        engine = None if stage.ahead else held.enter_context(engine_of(context, stage, trainer))
        sampler = RolloutSampler(context, stage, prompts, grader, engine)
        batches = in_step(context, stage, sampler, method)
        if stage.ahead:
            ahead = held.enter_context(engine_ahead(context, stage, trainer, threads))
            composer = stage_method(stage, context.name, room)
            batches = held.enter_context(Ahead(context, stage, sampler, composer, ahead))
        update = Update(stage, method, trainer, minis, teacher)
        loop = Loop(context, stage, sampler, batches, update, checkpoints, validation, budget_of(stage))
        return {**loop.run(done, own), "prompts": len(prompts), **validation.facts()}


@dataclass(frozen=True)
class InStep:
    """The batches of a stage, each composed in the step that trains it, from the weights that this step begins with."""

    context: StageContext
    stage: Rl
    sampler: RolloutSampler
    method: Method

    def begin(self, done: int, tensors: Mapping[str, Tensor]) -> None:
        """Nothing is due when a stage begins."""

    def take(self, step: int) -> DueBatch:
        """The batch of a step, counted from 0."""
        sampler = self.sampler
        with sampled_from(self.context, sampler.engine) as model:
            sampler.begin(step, model)
            composed = self.method.compose(sampler, self.stage.prompts, self.stage.rollouts)
        return DueBatch(step, step, sampler, composed, (sampler.drawn, sampler.expert_drawn))

    def state(self, done: int) -> dict[str, Tensor]:
        """A checkpoint holds no batch."""
        return {}

    def waste(self, done: int) -> dict[str, float]:
        """Nothing was sampled that is not trained."""
        return {}


@dataclass(frozen=True)
class Loop:
    """Rollout batches and their optimizer steps, until the steps or the budget of the stage are used up."""

    context: StageContext
    stage: Rl
    sampler: RolloutSampler
    batches: InStep | Partial | Ahead
    update: Update
    checkpoints: Checkpoints
    validation: Validation
    budget: Budget | None

    def run(self, done: int, own: Mapping[str, Any]) -> dict[str, Any]:
        """Take what is left of the stage. Returns how many ``steps`` it has then taken, and what was sampled in vain.

        Args:
            done: steps before.
            own: the state that the last checkpoint kept; empty without one.
        """
        context, stage, budget, method = self.context, self.stage, self.budget, self.update.method
        validation = self.validation
        ended = own.get("ended", False) and (budget is None or own.get("amount", budget.amount) >= budget.amount)
        if budget is not None:
            budget.spent = own.get("spent", 0.0)
        if own:
            resume_position(context, own, self.sampler, method)
        self.batches.begin(done, self.checkpoints.tensors)
        if context.leads:
            context.watcher.stage(context.name, stage.steps, done)
        watch, waste = Watch(context.name, stage.unknown), dict[str, Any](own.get("waste", {}))
        while done < stage.steps and not ended and not validation.ended:
            self.sampler.steps = expected_steps(stage, done, budget)
            with naming_step(context, done + 1, self.checkpoints.standing):
                line = self.step(done)
            done += 1
            watch.look(done, line)
            ended = budget is not None and budget.spend(line["flops"], line["trained_tokens"])
            line |= validation.measure(done, ended or done == stage.steps)
            best = validation.look(done, line)
            over = ended or validation.ended
            waste = self.batches.waste(done) if over or done == stage.steps else {}
            context.log({"stage": context.name, "kind": "rl", "step": done, **line, **waste})
            state, tensors = partial(self._state, ended, waste), partial(self.batches.state, done)
            self.checkpoints.after(done, state, tensors, last=over, best=best)
        return {"steps": done, **waste}

    def step(self, step: int) -> dict[str, Any]:
        """One rollout batch, counted from 0, its optimizer steps, and those of another kind.

        Returns:
            A line of metrics.
        """
        context, method, trainer = self.context, self.update.method, self.update.trainer
        start, before = time.perf_counter(), context.meter.total
        batch = self.batches.take(step)
        composed, sampler = batch.trajectories, batch.sampler
        context.meter.add(batch.flops)
        method.take_up(sampler)
        trajectories = leave_out(method, composed)
        rate = trainer.learning_rate(trainer.steps_taken)
        shown = composed[:SAMPLES_KEPT] if context.leads else []
        metrics = BatchMetrics(context.ranks, method.terms, shown)
        if sampler.total(len(trajectories)):
            self.update.take(trajectories, metrics)
        self.update.take_side_steps(sampler, metrics)
        if context.leads:
            keep_samples(context, shown, step + 1, metrics.tokens)
        line = metrics.line(context, sampler, composed, rate, time.perf_counter() - start)
        if self.stage.ahead:
            line |= stale_facts(batch, context.ranks, line["seconds"])
        if isinstance(self.batches, Partial):
            line |= self.batches.facts(batch)
        return line | {"executed_flops": context.executed_flops(before)}

    def _state(self, ended: bool, waste: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint keeps of the stage."""
        budget, sampler = self.budget, self.sampler
        return {
            "spent": budget.spent if budget is not None else 0.0,
            "ended": ended,
            **({"amount": budget.amount} if budget is not None else {}),
            **self.validation.state(),
            **({"waste": dict(waste)} if waste else {}),
            "drawn": [sampler.drawn, sampler.expert_drawn],
            "method": same_or_each(self.context.ranks.gather(self.update.method.state())),
        }


def in_step(context: StageContext, stage: Rl, sampler: RolloutSampler, method: Method) -> InStep | Partial:
    """The batches of a stage that is not sampled ahead."""
    if stage.partial is not None:
        return Partial(context, stage, sampler, stage.partial)
    return InStep(context, stage, sampler, method)


def mini_batches_of(stage: Rl) -> int:
    """Optimizer steps on one rollout batch."""
    return stage.prompts // (stage.mini_batch or stage.prompts)


def check_settings(name: str, stage: Rl, world: int) -> None:
    """Refuse settings of a stage that do not go together. Raises RecipeError."""
    minis = mini_batches_of(stage)
    if stage.prompts % (world * minis):
        raise RecipeError(
            f"{stage.prompts} prompts cannot be dealt evenly to {world} ranks and all mini-batches",
            remedy="choose prompts and mini_batch divisible by the number of ranks",
            field=f"{name}.prompts",
        )
    budget = budget_of(stage)
    if budget is not None and stage.schedule != "constant":
        raise RecipeError(
            f"a {stage.schedule} schedule ends at `steps`, and the budget of {budget.measure} may end it earlier",
            remedy=f'set schedule = "constant", or give steps without {budget.measure}',
            field=f"{name}.schedule",
        )
    if stage.engine == "vllm":
        where = f"{name}.vllm"
        ranks_per_engine(vllm_settings(stage.vllm, where), world, where)


def expected_steps(stage: Rl, done: int, budget: Budget | None) -> int:
    """How many steps the stage will have, for methods whose schedule runs over all of it.

    Under a budget that is what the steps so far let expect: the schedule follows the share that is spent.
    """
    if budget is None or not budget.spent:
        return stage.steps
    return min(stage.steps, max(done + 1, round(done * budget.amount / budget.spent)))


@contextmanager
def engine_ahead(context: StageContext, stage: Rl, trainer: Trainer, threads: int | None) -> Iterator[EngineAhead]:
    """The engine that samples ahead, running: as :func:`engine_of`, and for the native one a process of its own."""
    if stage.engine == "native":
        with sampling_child(context, threads) as child:
            yield child
        return
    with engine_of(context, stage, trainer) as engine:
        assert engine is not None, "the native engine is no other process"
        yield engine

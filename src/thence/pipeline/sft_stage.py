"""The stage that trains on demonstrations."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from thence.accounting.flops import rule_flops
from thence.data.order import batch_at, epoch_order, steps_per_epoch
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import DataError
from thence.methods.base import Method, TokenFacts, bare_row, make_batch
from thence.methods.registry import stage_method
from thence.models.lengths import context_of
from thence.objective import Batch, Logp
from thence.pipeline.context import StageContext, budget_of, make_trainer
from thence.pipeline.prompts import check_trained
from thence.pipeline.room import check_rows
from thence.pipeline.saving import naming_step, refuse_what_is_broken, saving
from thence.pipeline.validation import Validation
from thence.recipe import Sft
from thence.train.trainer import Trainer

log = logging.getLogger(__name__)


def run_sft(context: StageContext, stage: Sft) -> dict[str, Any]:
    """Train the context's model on demonstrations. Returns facts for ``done.json``."""
    method = stage_method(stage, context.name)
    found = context.load_prompts(stage.data)
    prompts = [prompt for prompt in found if prompt.demonstration_ids]
    if 0 < len(prompts) < len(found):
        log.warning("%d of %d examples have no demonstration and are left out", len(found) - len(prompts), len(found))
    check_trained(prompts or found, stage.train_on)
    check_rows(context.name, prompts, context_of(context.model.config))
    trained, held_out = put_aside(prompts, stage.held_out, context.recipe.seed)
    seed = context.order_seed(stage.data)
    cost = StepCost(context.n_parameters, method.reference_passes)
    steps = affordable_steps(trained, stage, seed, cost)
    reference = context.frozen_policy() if method.reference_passes else None
    trainer = make_trainer(context, stage, steps, reference)
    with ExitStack() as held:
        checkpoints = held.enter_context(saving(context, trainer, stage, steps))
        done, own = checkpoints.resume()
        validation = Validation(context, stage, held)
        validation.resume(own)
        if context.leads:
            context.watcher.stage(context.name, steps, done)
        while done < steps and not validation.ended:
            step = done
            chosen = batch_at(len(trained), stage.batch, seed, step)
            mine = [trained[i] for i in chosen[context.ranks.rank :: context.ranks.world]]
            rate, before = trainer.learning_rate(trainer.steps_taken), context.meter.total
            with naming_step(context, step + 1, checkpoints.standing):
                batch, figures = demonstration_batch(trainer, method, trajectories_of(mine, stage.train_on))
                report = trainer.step(batch)
            line = {
                "stage": context.name,
                "kind": "sft",
                "step": step + 1,
                "epoch": (step + 1) / steps_per_epoch(len(trained), stage.batch),
                "loss": report.loss,
                **figures,
                "grad_norm": report.grad_norm,
                "lr": rate,
                "entropy": report.entropy,
                "sequences": report.rows,
                "tokens": report.tokens,
                "trained_tokens": report.trained_tokens,
                "flops": cost.of(report.trained_tokens),
                "executed_flops": context.executed_flops(before),
                "seconds": report.seconds,
                "tokens_per_s": report.tokens / report.seconds,
            }
            if not all(isinstance(term.surrogate, Logp) for term in method.terms):
                line["nll"] = -report.logp  # what the held-out loss compares with
            if report.skipped:
                line["skipped_steps"] = 1
            if held_out and (step == 0 or (step + 1) % stage.held_out_every == 0 or step + 1 == steps):
                line["held_out_loss"] = missed = held_out_loss(trainer, held_out, stage.train_on)
                if not math.isfinite(missed):
                    refuse_what_is_broken(context, f"after step {step + 1}", checkpoints.standing)
                    log.warning(
                        "step %d: the held-out loss is %s; a token of these examples cannot come", step + 1, missed
                    )
            line |= validation.measure(step + 1, step + 1 == steps)
            best = validation.look(step + 1, line)
            context.log(line)
            checkpoints.after(step + 1, validation.state, last=validation.ended, best=best)
            done = step + 1
    return {"steps": done, "examples": len(trained), **validation.facts()}


def put_aside(prompts: Sequence[Prompt], count: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Split off held-out examples. Raises DataError if none would be left to train on."""
    if count >= len(prompts):
        raise DataError(
            f"held_out = {count} leaves nothing of {len(prompts)} examples", remedy="hold out fewer", field="held_out"
        )
    order = epoch_order(len(prompts), seed, -1)
    return [prompts[i] for i in sorted(order[count:])], [prompts[i] for i in sorted(order[:count])]


def total_steps(examples: int, stage: Sft) -> int:
    """Optimizer steps of the stage."""
    return stage.steps or max(1, round(stage.epochs * steps_per_epoch(examples, stage.batch)))


@dataclass(frozen=True)
class StepCost:
    """FLOPs of a step by the rule, from its trained tokens.

    Args:
        n_parameters: of the model.
        reference_passes: how often a reference model reads every row.
    """

    n_parameters: int
    reference_passes: int = 0

    def of(self, trained_tokens: int) -> float:
        """FLOPs: 6 N a trained token, and 2 N for every time that a reference model reads it."""
        return rule_flops(self.n_parameters, trained_tokens, scored=self.reference_passes * trained_tokens)


def demonstration_batch(
    trainer: Trainer, method: Method, trajectories: Sequence[Trajectory]
) -> tuple[Batch, dict[str, float]]:
    """One optimizer step's batch of demonstrations, with what the method asks of its models; figures for the log."""
    bare, facts = [bare_row(trajectory) for trajectory in trajectories], []
    if method.uses_facts or method.uses_reference:
        unknown = [torch.full((row.n_trained,), math.nan) for row in bare]
        now = trainer.statistics(bare) if method.uses_facts else list(zip(unknown, unknown, strict=True))
        theirs = trainer.reference_logps(bare) if method.uses_reference else [None] * len(bare)
        facts = [TokenFacts(*own, None, ref, trainer.vocabulary) for own, ref in zip(now, theirs, strict=True)]
    sums = method.figures(trajectories, facts)
    tokens = sum(row.n_trained for row in bare)
    *totals, count = trainer.ranks.sum_floats(torch.tensor([*sums.values(), tokens], dtype=torch.float64)).tolist()
    figures = {name: total / max(count, 1) for name, total in zip(sums, totals, strict=True)}
    return make_batch(method, trajectories, facts), figures


def affordable_steps(prompts: Sequence[Prompt], stage: Sft, seed: int | None, cost: StepCost) -> int:
    """Optimizer steps of the stage, fewer where its budget ends earlier; at least one.

    The order of the data is known before the first step, so the learning-rate schedule ends with the budget.
    """
    most, budget = total_steps(len(prompts), stage), budget_of(stage)
    for step in range(most if budget is not None else 0):
        chosen = [prompts[i] for i in batch_at(len(prompts), stage.batch, seed, step)]
        tokens = sum(len(p.demonstration_ids or ()) for p in chosen)
        if stage.train_on == "all":
            tokens += sum(len(p.token_ids) - 1 for p in chosen)
        if budget is not None and budget.spend(cost.of(tokens), tokens):
            return step + 1
    return most


def trajectories_of(prompts: Sequence[Prompt], train_on: str) -> list[Trajectory]:
    """Demonstrations to train on."""
    shown = [demonstration(prompt) for prompt in prompts]
    return [whole(trajectory) for trajectory in shown] if train_on == "all" else shown


def demonstration(prompt: Prompt) -> Trajectory:
    """The expert's trajectory."""
    return Trajectory(prompt, prompt.demonstration_ids or (), origin="demonstration")


def whole(trajectory: Trajectory) -> Trajectory:
    """The trajectory with all but its first token as response: what pretraining trains on."""
    ids = (*trajectory.prompt.token_ids, *trajectory.response_ids)
    prompt = Prompt(trajectory.prompt.index, ids[:1], text=trajectory.prompt.text, group=trajectory.prompt.group)
    return Trajectory(prompt, ids[1:], origin=trajectory.origin)


def held_out_loss(trainer: Trainer, prompts: Sequence[Prompt], train_on: str) -> float:
    """Token-mean cross-entropy of demonstrations that are never trained, over all ranks, nats."""
    ranks = trainer.ranks
    rows = [bare_row(t) for t in trajectories_of(prompts[ranks.rank :: ranks.world], train_on)]
    parts = [logp for logp, _ in trainer.statistics(rows)]
    sums = torch.tensor([sum(float(p.double().sum()) for p in parts), sum(len(p) for p in parts)], dtype=torch.float64)
    total, count = ranks.sum_floats(sums).tolist()
    return -total / count

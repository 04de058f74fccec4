"""The stage that trains on the policy's own responses."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from thence.accounting.flops import rule_flops
from thence.data.chat import end_token_ids
from thence.data.order import drawn_from
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import RecipeError
from thence.evaluate.measure import respond, sample_record
from thence.methods.base import Method, make_rows
from thence.methods.dapo import groups_of
from thence.methods.registry import make_method
from thence.objective import Batch, TokenStats
from thence.objective.kl import kl_estimate
from thence.objective.terms import needs_behaviour, needs_reference
from thence.pipeline.context import Checkpoints, Context, make_trainer
from thence.pipeline.prompts import check_answers, load_prompts
from thence.recipe import Rl
from thence.rollout.native import Sampling
from thence.train.step import StepReport, policy_statistics
from thence.train.trainer import Trainer
from thence.verify.reward import Grader, load_reward

SAMPLES_KEPT = 8  # responses of a step that are written for the reader


class RolloutSampler:
    """Gives a method prompts in the data's order, and graded responses of the policy.

    Each rank draws from its own share of the prompts; ``drawn`` is the position in it.
    """

    def __init__(self, context: Context, stage: Rl, prompts: Sequence[Prompt], grader: Grader):
        self.context, self.grader = context, grader
        self.prompts = prompts[context.ranks.rank :: context.ranks.world]
        self.drawn = 0
        self.seconds = 0.0
        self.sampling = Sampling(
            max_tokens=stage.max_tokens,
            temperature=stage.temperature,
            top_p=stage.top_p,
            top_k=stage.top_k,
            stop_ids=end_token_ids(context.tokenizer, context.recipe.stage_data(stage.data).template),
            rows=stage.rollout_rows,
        )

    def next_prompts(self, count: int) -> list[Prompt]:
        chosen = drawn_from(len(self.prompts), self.drawn, count, self.context.recipe.seed)
        self.drawn += count
        return [self.prompts[i] for i in chosen]

    def rollouts(self, prompts: Sequence[Prompt], n: int) -> list[Trajectory]:
        start = time.perf_counter()
        seed_parts = (*self.context.seed_parts(), "rollout", self.drawn)
        found = respond(self.context.model, self.context.tokenizer, self.grader, prompts, n, self.sampling, seed_parts)
        self.seconds += time.perf_counter() - start
        return found


def run_rl(context: Context, stage: Rl) -> dict[str, Any]:
    """Train the context's model on its own graded responses. Returns facts for ``done.json``."""
    method = make_method(stage.method, stage.options, "rl")
    prompts = load_prompts(context.recipe.stage_data(stage.data), context.tokenizer)
    check_answers(prompts, stage.reward)
    if stage.prompts % (context.ranks.world * (stage.prompts // (stage.mini_batch or stage.prompts))):
        raise RecipeError(
            f"{stage.prompts} prompts cannot be dealt evenly to {context.ranks.world} ranks and all mini-batches",
            remedy="choose prompts and mini_batch divisible by the number of ranks",
            field=f"{context.name}.prompts",
        )
    minis = stage.prompts // (stage.mini_batch or stage.prompts)
    reference = copy.deepcopy(context.model).requires_grad_(False) if needs_reference(method.terms) else None
    trainer = make_trainer(context, stage, stage.steps * minis)
    checkpoints = Checkpoints(context, trainer, stage.checkpoint_every, stage.steps)
    done, own = checkpoints.resume()
    with load_reward(stage.reward, seconds=stage.reward_seconds) as grader:
        sampler = RolloutSampler(context, stage, prompts, grader)
        if own:
            sampler.drawn = own["drawn"][context.ranks.rank]
            method.restore(own["method"])
        if context.leads:
            context.watcher.stage(context.name, stage.steps, done)
        for step in range(done, stage.steps):
            line = rl_step(context, stage, method, trainer, sampler, reference, minis)
            context.log({"stage": context.name, "kind": "rl", "step": step + 1, **line})
            checkpoints.after(
                step + 1, lambda: {"drawn": context.ranks.gather(sampler.drawn), "method": method.state()}
            )
    return {"steps": stage.steps, "prompts": len(prompts)}


def rl_step(
    context: Context, stage: Rl, method: Method, trainer: Trainer, sampler: RolloutSampler, reference: Any, minis: int
) -> dict[str, Any]:
    """One rollout batch and its optimizer steps. Returns a line of metrics."""
    start, sampler.seconds = time.perf_counter(), 0.0
    trajectories = method.compose(sampler, stage.prompts // context.ranks.world, stage.rollouts)
    rows = make_rows(trajectories, method.weigh(trajectories))
    rate = trainer.learning_rate(trainer.steps_taken)
    mismatch = Mismatch([t.sampler_logps for t in trajectories])
    if minis > 1 and needs_behaviour(method.terms):
        behaviour = trainer.statistics(rows, stage.temperature)
        rows = [replace(row, behaviour=logp) for row, (logp, _) in zip(rows, behaviour, strict=True)]
    if reference is not None:
        old = policy_statistics(reference, rows, stage.temperature, trainer.settings)
        rows = [replace(row, reference=logp) for row, (logp, _) in zip(rows, old, strict=True)]
    reports = []
    for part in mini_batches(trajectories, minis):
        batch = Batch(method.terms, tuple(rows[i] for i in part), stage.temperature)
        # only before the first optimizer step of a batch do sampler and trainer hold the same weights
        observe = mismatch.observer(part) if not reports else None
        reports.append(trainer.step(batch, observe=observe))
    if context.leads:
        keep_samples(context, trajectories, trainer.steps_taken // minis)
    return metrics(context, trajectories, reports, mismatch, rate, sampler.seconds, time.perf_counter() - start)


def mini_batches(trajectories: Sequence[Trajectory], minis: int) -> list[list[int]]:
    """Indices of the trajectories of each optimizer step: whole groups, dealt evenly."""
    sizes = [len(group) for group in groups_of(trajectories)]
    starts = [sum(sizes[:g]) for g in range(len(sizes))]
    share = -(-len(sizes) // minis) if sizes else 0
    parts = [range(m * share, min((m + 1) * share, len(sizes))) for m in range(minis)]
    return [[i for g in part for i in range(starts[g], starts[g] + sizes[g])] for part in parts]


class Mismatch:
    """How far the sampler's log-probabilities lie from the trainer's for the same tokens and weights."""

    def __init__(self, sampler_logps: Sequence[tuple[float, ...] | None]):
        self.sampler_logps = sampler_logps
        self.kl_sum = self.tokens = self.largest = 0.0

    def observer(self, part: Sequence[int]):
        """For :meth:`Trainer.step`: ``part`` says which trajectories the batch's rows are."""

        def observe(group: Sequence[int], stats: TokenStats) -> None:
            reported = [self.sampler_logps[part[i]] for i in group]
            if any(r is None for r in reported):
                return
            sampled_T = torch.tensor([logp for r in reported for logp in (r or ())], dtype=torch.float64)
            trained_T = stats.logp_T.double().cpu()
            self.kl_sum += float(kl_estimate(sampled_T, trained_T).sum())
            self.tokens += len(sampled_T)
            self.largest = max(self.largest, float((sampled_T - trained_T).abs().max()))

        return observe


def metrics(
    context: Context,
    trajectories: Sequence[Trajectory],
    reports: Sequence[StepReport],
    mismatch: Mismatch,
    rate: float,
    sample_seconds: float,
    seconds: float,
) -> dict[str, Any]:
    """One line of metrics over all ranks; of several optimizer steps the means, except the largest gradient norm."""
    reports = [report for report in reports if report.rows] or list(reports)
    scores = torch.tensor([t.score or 0.0 for t in trajectories], dtype=torch.float64)
    sums = torch.tensor(
        [
            len(trajectories),
            float(scores.sum()),
            float(scores.square().sum()),
            sum(t.verdict == "right" for t in trajectories),
            sum(t.verdict == "unknown" for t in trajectories),
            sum(t.finish == "length" for t in trajectories),
            sum(len(t.response_ids) for t in trajectories),
            mismatch.kl_sum,
            mismatch.tokens,
        ],
        dtype=torch.float64,
    )
    rows, total, squares, right, unknown, truncated, response, kl, seen = context.ranks.sum_floats(sums).tolist()
    n = max(rows, 1)
    tokens = sum(report.tokens for report in reports)
    n_parameters = sum(p.numel() for p in context.model.parameters())
    return {
        "loss": _mean([r.loss for r in reports]),
        "grad_norm": max(r.grad_norm for r in reports),
        "lr": rate,
        "entropy": _mean([r.entropy for r in reports]),
        "clip_share": _mean([r.clip_share for r in reports]),
        "reward": total / n,
        "reward_std": max(0.0, squares / n - (total / n) ** 2) ** 0.5,
        "accuracy": right / n,
        "unknown": int(unknown),
        "truncated": truncated / n,
        "response_tokens": response / n,
        "mismatch_kl": kl / seen if seen else None,
        "sequences": int(rows),
        "tokens": tokens,
        "trained_tokens": sum(r.trained_tokens for r in reports),
        "flops": rule_flops(n_parameters, sum(r.trained_tokens for r in reports), response),
        "seconds": seconds,
        "sample_seconds": sample_seconds,
        "train_seconds": sum(r.seconds for r in reports),
        "tokens_per_s": tokens / seconds,
    }


def keep_samples(context: Context, trajectories: Sequence[Trajectory], step: int) -> None:
    """Write the first group's responses for the reader; a crash can lose them, a resumed run writes them again."""
    path = context.folder.stage(context.name) / "samples.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for trajectory in trajectories[:SAMPLES_KEPT]:
            file.write(json.dumps(sample_record(trajectory, stage=context.name, step=step)) + "\n")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

"""The stage that trains on the policy's own responses."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thence.accounting.flops import rule_flops
from thence.data.trajectory import Trajectory
from thence.errors import RecipeError
from thence.files import to_json
from thence.methods.base import Method, TokenFacts, make_rows
from thence.methods.registry import stage_method
from thence.methods.unknown import leave_out, scores_of
from thence.models.lengths import context_of
from thence.objective import Batch, Entropy, NegativeKl, Row, Term, TokenStats, divisors, local_counts
from thence.objective.kl import kl_estimate
from thence.objective.terms import needs_behaviour, needs_reference
from thence.pipeline.context import Budget, Checkpoints, Context, budget_of, make_trainer
from thence.pipeline.dealing import mini_batches, resume_position, same_or_each
from thence.pipeline.lessons import Lessons, Watch, each_of
from thence.pipeline.prompts import check_answers, load_prompts
from thence.pipeline.rewards import stage_reward
from thence.pipeline.room import response_tokens
from thence.pipeline.sample_lines import rollout_line
from thence.pipeline.sampler import Renewed, RolloutSampler
from thence.recipe import Rl
from thence.rollout.correction import truncated_importance
from thence.rollout.vllm.engine import VllmEngine
from thence.rollout.vllm.settings import vllm_settings
from thence.train.model import save_model
from thence.train.parallel import Ranks
from thence.train.step import StepReport, policy_statistics
from thence.train.trainer import Trainer

SAMPLES_KEPT = 8  # responses of a step that are written for the reader


def run_rl(context: Context, stage: Rl) -> dict[str, Any]:
    """Train the context's model on its own graded responses. Returns facts for ``done.json``."""
    prompts = load_prompts(context.recipe.stage_data(stage.data), context.tokenizer)
    check_answers(prompts, stage.reward)
    room = response_tokens(context.name, stage, prompts, context_of(context.model.config), say=False)
    method = stage_method(stage, context.name, room)
    check_settings(context.name, stage, context.ranks.world)
    budget = budget_of(stage)
    minis = stage.prompts // (stage.mini_batch or stage.prompts)
    reference = copy.deepcopy(context.model).requires_grad_(False) if needs_reference(method.terms) else None
    trainer = make_trainer(context, stage, stage.steps * minis)
    checkpoints = Checkpoints(context, trainer, stage.checkpoint_every, stage.steps)
    done, own = checkpoints.resume()
    with stage_reward(stage) as grader, engine_of(context, stage) as engine:
        sampler = RolloutSampler(context, stage, prompts, grader, engine)
        ended = own.get("ended", False) and (budget is None or own.get("amount", budget.amount) >= budget.amount)
        if budget is not None:
            budget.spent = own.get("spent", 0.0)
        if own:
            resume_position(context, own, sampler, method)
        if context.leads:
            context.watcher.stage(context.name, stage.steps, done)
        watch = Watch(context.name, stage.unknown)
        while done < stage.steps and not ended:
            sampler.steps = expected_steps(stage, done, budget)
            line = rl_step(context, stage, method, trainer, sampler, reference, minis, done)
            done += 1
            watch.look(done, line)
            ended = budget is not None and budget.spend(line["flops"], line["trained_tokens"])
            state = {"spent": budget.spent if budget is not None else 0.0, "ended": ended}
            state |= {"amount": budget.amount} if budget is not None else {}
            context.log({"stage": context.name, "kind": "rl", "step": done, **line})
            checkpoints.after(
                done,
                lambda state=state: {
                    **state,
                    "drawn": [sampler.drawn, sampler.expert_drawn],
                    "method": same_or_each(context.ranks.gather(method.state())),
                },
                last=ended,
            )
    return {"steps": done, "prompts": len(prompts)}


def check_settings(name: str, stage: Rl, world: int) -> None:
    """Refuse settings of a stage that do not go together. Raises RecipeError."""
    minis = stage.prompts // (stage.mini_batch or stage.prompts)
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
    if stage.engine == "vllm" and world > 1:
        raise RecipeError(
            "vLLM samples for a single rank only",
            remedy='run one process, or set engine = "native"',
            field=f"{name}.engine",
        )


def expected_steps(stage: Rl, done: int, budget: Budget | None) -> int:
    """How many steps the stage will have, for methods whose schedule runs over all of it.

    Under a budget that is what the steps so far let expect: the schedule follows the share that is spent.
    """
    if budget is None or not budget.spent:
        return stage.steps
    return min(stage.steps, max(done + 1, round(done * budget.amount / budget.spent)))


def rl_step(
    context: Context,
    stage: Rl,
    method: Method,
    trainer: Trainer,
    sampler: RolloutSampler,
    reference: Any,
    minis: int,
    step: int,
) -> dict[str, Any]:
    """One rollout batch, its optimizer steps, and those of another kind. Returns a line of metrics."""
    start, before = time.perf_counter(), context.meter.total
    sampler.begin(step)
    composed = method.compose(sampler, stage.prompts, stage.rollouts)
    trajectories = leave_out(method, composed)
    rate = trainer.learning_rate(trainer.steps_taken)
    mismatch = Mismatch(trajectories)
    shares = Shares(context.ranks)
    lessons = Lessons(context.ranks, method.terms)
    reports = []
    if sampler.total(len(trajectories)):
        reports = policy_steps(stage, method, trainer, trajectories, reference, minis, mismatch, shares, lessons)
    side = []
    for extra in method.side_steps(sampler):
        rows = make_rows(extra.trajectories, extra.weights)
        shares.add(extra.terms, extra.trajectories, extra.weights)
        batch = Batch(extra.terms, tuple(rows), stage.temperature)
        side.append(trainer.step(batch, extra.name, lr=extra.lr, clip_norm=extra.clip_norm))
        method.took_step(extra.name, side[-1].grad_norm)
    if context.leads:
        keep_samples(context, composed, step + 1)
    line = metrics(context, sampler, reports, side, mismatch, rate, time.perf_counter() - start)
    mixed = shares.mixed()
    line["executed_flops"] = context.executed_flops(before)
    line |= lessons.line(composed, len(sampler.seen))
    return line | ({"shares": mixed} if mixed else {})


def policy_steps(
    stage: Rl,
    method: Method,
    trainer: Trainer,
    trajectories: Sequence[Trajectory],
    reference: Any,
    minis: int,
    mismatch: Mismatch,
    shares: Shares,
    lessons: Lessons | None = None,
) -> list[StepReport]:
    """The optimizer steps on one rollout batch."""
    blank = [torch.zeros(len(method.terms), len(t.response_ids), dtype=torch.float64) for t in trajectories]
    rows = make_rows(trajectories, blank)
    replays = any(row.behaviour is not None for row in rows)
    if needs_behaviour(method.terms) and (minis > 1 or replays):
        # A replay keeps the log-probabilities of the policy that sampled it.
        old = trainer.statistics([replace(row, behaviour=None) for row in rows], stage.temperature)
        rows = [r if r.behaviour is not None else replace(r, behaviour=o) for r, (o, _) in zip(rows, old, strict=True)]
    if reference is not None:
        old = policy_statistics(reference, rows, stage.temperature, trainer.settings)
        if trainer.meter is not None:
            trainer.meter.scored([len(row.token_ids) for row in rows], sum(row.n_trained for row in rows))
        rows = [replace(row, reference=logp) for row, (logp, _) in zip(rows, old, strict=True)]
    whole = None if method.uses_facts else method.weigh(trajectories)
    trust = importance_weights(stage, trainer, trajectories, rows)
    reports = []
    for part in mini_batches(trajectories, minis, trainer.ranks):
        chosen = [trajectories[i] for i in part]
        if whole is None:
            facts = [TokenFacts(*f) for f in trainer.statistics([rows[i] for i in part], stage.temperature)]
            weights = method.weigh(chosen, facts)
        else:
            weights = [whole[i] for i in part]
        if trust is not None:
            policy_J = torch.tensor([not isinstance(term.surrogate, Entropy | NegativeKl) for term in method.terms])
            weights = [torch.where(policy_J[:, None], w * trust[i], w) for i, w in zip(part, weights, strict=True)]
        own = tuple(replace(rows[i], weights=weight) for i, weight in zip(part, weights, strict=True))
        shares.add(method.terms, chosen, weights)
        if lessons is not None:
            lessons.add(chosen, weights)
        # only before the first optimizer step of a batch do sampler and trainer hold the same weights
        observers = [mismatch.observer(part)] if not reports else []
        observers += lessons.observers(own) if lessons is not None else []
        reports.append(trainer.step(Batch(method.terms, own, stage.temperature), observe=each_of(observers)))
        method.took_step("main", reports[-1].grad_norm)
    return reports


def importance_weights(
    stage: Rl, trainer: Trainer, trajectories: Sequence[Trajectory], rows: Sequence[Row]
) -> list[Tensor] | None:
    """Truncated importance weights of every trained token, shape (n,) each; None where they are not asked for.

    Tokens that the policy did not sample as they stand (demonstrations, prefixes and what follows them, replays) get 1.
    """
    if stage.importance_bound is None:
        return None
    weights = []
    scored = trainer.statistics([replace(row, behaviour=None) for row in rows], stage.temperature)
    for trajectory, (trained, _) in zip(trajectories, scored, strict=True):
        if trajectory.sampler_logps is None or trajectory.origin != "rollout":
            weights.append(torch.ones(len(trained), dtype=torch.float64))
        else:
            sampled = torch.tensor(trajectory.sampler_logps, dtype=torch.float64)
            weights.append(truncated_importance(trained.double(), sampled, stage.importance_bound))
    return weights


@contextmanager
def engine_of(context: Context, stage: Rl) -> Iterator[Renewed | None]:
    """The engine that samples, running; None: this process samples with its own weights.

    Raises:
        RecipeError: settings that vLLM does not have.
        UserError: vLLM does not start.
    """
    if stage.engine == "native":
        yield None
        return
    settings = vllm_settings(stage.vllm, f"{context.name}.vllm")
    with tempfile.TemporaryDirectory(prefix="thence-vllm-") as folder:
        save_model(context.model, context.tokenizer, Path(folder))
        with VllmEngine(settings, None if settings.server else Path(folder)) as engine:
            yield engine


class Shares:
    """How much of a step's weight lies on which kind of token: own responses, demonstrations, prefixes, replays."""

    KINDS = ("rollout", "demonstration", "prefix", "replay")

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.sums = torch.zeros(len(self.KINDS), dtype=torch.float64)

    def add(self, terms: Sequence[Term], trajectories: Sequence[Trajectory], weights: Sequence[Tensor]) -> None:
        """Add the absolute weights of a batch over their normalisers' constants, surrogates with a slope of their own
        (shaped probabilities) counted as they stand."""
        own = all(t.origin == "rollout" and not t.prefix for t in trajectories)
        if self.ranks.world == 1 and own and not self.sums.any():
            return
        batch = Batch(tuple(terms), tuple(make_rows(trajectories, weights)))
        divisor_J = torch.tensor(divisors(terms, self.ranks.sum_counts(local_counts(batch))), dtype=torch.float64)
        for trajectory, weight in zip(trajectories, weights, strict=True):
            size_n = (weight.abs().double() / divisor_J[:, None]).sum(0)
            self.sums[self.KINDS.index(trajectory.origin)] += size_n[trajectory.prefix :].sum()
            self.sums[self.KINDS.index("prefix")] += size_n[: trajectory.prefix].sum()

    def mixed(self) -> dict[str, float]:
        """Share of each kind, over all ranks; empty where only the policy's own tokens were trained."""
        sums = self.ranks.sum_floats(self.sums.clone())
        if not sums[1:].any():
            return {}
        return {kind: float(x) for kind, x in zip(self.KINDS, sums / sums.sum(), strict=True) if x}


class Mismatch:
    """How far the sampler's log-probabilities lie from the trainer's for the same tokens and weights.

    Only of responses that the policy sampled whole; demonstrations, continuations and replays are passed over.
    """

    def __init__(self, trajectories: Sequence[Trajectory]):
        self.trajectories = trajectories
        self.kl_sum = self.tokens = self.largest = 0.0

    def observer(self, part: Sequence[int]):
        """For :meth:`Trainer.step`: ``part`` says which trajectories the batch's rows are."""

        def observe(group: Sequence[int], stats: TokenStats) -> None:
            rows = [self.trajectories[part[i]] for i in group]
            parts = stats.logp_T.double().cpu().split([len(row.response_ids) for row in rows])
            for row, trained in zip(rows, parts, strict=True):
                if row.sampler_logps is not None and row.origin == "rollout" and len(trained):
                    sampled = torch.tensor(row.sampler_logps, dtype=torch.float64)
                    self.kl_sum += float(kl_estimate(sampled, trained).sum())
                    self.tokens += len(trained)
                    self.largest = max(self.largest, float((sampled - trained).abs().max()))

        return observe


def metrics(
    context: Context,
    sampler: RolloutSampler,
    reports: Sequence[StepReport],
    side: Sequence[StepReport],
    mismatch: Mismatch,
    rate: float,
    seconds: float,
) -> dict[str, Any]:
    """One line of metrics over all ranks; of several optimizer steps the means, except the largest gradient norm.

    Rewards, lengths and verdicts are those of every response that was sampled, trained or not. The mean reward is over
    the responses that have one; for the accuracy, one that nobody can judge counts as not right, as in evaluation.
    There is no accuracy (None) where a score is a degree without a threshold.
    """
    seen = sampler.seen
    taken = [report for report in (*reports, *side) if report.rows] or [*reports, *side]
    main = [report for report in reports if report.rows] or taken
    scores = torch.tensor(scores_of(seen), dtype=torch.float64)
    sums = torch.tensor(
        [
            len(seen),
            float(scores.sum()),
            float(scores.square().sum()),
            sum(t.verdict == "right" for t in seen),
            sum(t.verdict == "unknown" for t in seen),
            sum(t.finish == "length" for t in seen),
            sum(t.sampled_tokens for t in seen),
            mismatch.kl_sum,
            mismatch.tokens,
            len(scores),
            sum(t.verdict == "graded" for t in seen),
        ],
        dtype=torch.float64,
    )
    summed = context.ranks.sum_floats(sums).tolist()
    count, total, squares, right, unknown, truncated, sampled, kl, compared, known, graded = summed
    n, scored = max(count, 1), max(known, 1)
    tokens = sum(report.tokens for report in taken)
    trained = sum(report.trained_tokens for report in taken)
    line = {
        "loss": _mean([r.loss for r in main]),
        "grad_norm": max((r.grad_norm for r in main), default=0.0),
        "lr": rate,
        "entropy": _mean([r.entropy for r in main]),
        "clip_share": _mean([r.clip_share for r in main]),
        "reward": total / scored,
        "reward_std": max(0.0, squares / scored - (total / scored) ** 2) ** 0.5,
        "accuracy": None if graded else right / n,
        "unknown": int(unknown),
        "unknown_share": unknown / n,
        "truncated": truncated / n,
        "response_tokens": sampled / n,
        "mismatch_kl": kl / compared if compared else None,
        "sequences": sum(report.rows for report in taken),
        "tokens": tokens,
        "trained_tokens": trained,
        "sampled_tokens": int(sampled),
        "flops": rule_flops(context.n_parameters, trained, sampled),
        "seconds": seconds,
        "sample_seconds": sampler.seconds,
        "train_seconds": sum(r.seconds for r in taken),
        "tokens_per_s": tokens / seconds,
    }
    if skipped := sum(report.skipped for report in taken):
        line["skipped_steps"] = skipped
    if side:
        line |= {"side_steps": len(side), "side_loss": _mean([r.loss for r in side])}
    return line


def keep_samples(context: Context, trajectories: Sequence[Trajectory], step: int) -> None:
    """Write the first group's responses for the reader; a crash can lose them, a resumed run writes them again."""
    path = context.folder.stage(context.name) / "samples.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for trajectory in trajectories[:SAMPLES_KEPT]:
            file.write(to_json(rollout_line(trajectory, stage=context.name, step=step)) + "\n")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)

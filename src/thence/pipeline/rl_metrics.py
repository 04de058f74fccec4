"""What is measured on one rollout batch of an RL stage, and the line of metrics that it becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from thence.accounting.flops import rule_flops
from thence.data.trajectory import Trajectory
from thence.jsonl import append_jsonl
from thence.methods.unknown import scores_of
from thence.objective import Batch, Row, Term, TokenStats, divisors, local_counts
from thence.objective.kl import kl_estimate
from thence.pipeline.context import StageContext
from thence.pipeline.due import DueBatch
from thence.pipeline.lessons import Lessons, each_of
from thence.pipeline.sample_lines import rollout_line
from thence.pipeline.sampler import RolloutSampler
from thence.pipeline.token_figures import TokenFigures
from thence.train.parallel import Ranks
from thence.train.step import Observer, StepReport

FAILURES = ("error", "timeout")
"""Ends of rollouts whose environment failed."""
SAMPLES_KEPT = 8  # responses of a step that are written for the reader


class BatchMetrics:
    """Collects what the optimizer steps on one rollout batch show.

    Args:
        terms: of the method.
        shown: responses that are written for the reader, with the figures of some of their tokens.
    """

    def __init__(self, ranks: Ranks, terms: Sequence[Term], shown: Sequence[Trajectory] = ()) -> None:
        self.ranks = ranks
        self.mismatch, self.shares, self.lessons = Mismatch(), Shares(ranks), Lessons(ranks, terms)
        self.tokens = TokenFigures(terms, shown)
        self.reports: list[StepReport] = []
        self.side: list[StepReport] = []
        self.scores: list[Tensor | None] | None = None
        self.trust: list[float] | None = None

    def weighed_by(self, trust: Sequence[Tensor], trajectories: Sequence[Trajectory], bound: float) -> None:
        """Take in the importance weights of every response token. Those that were not weighed are passed over."""
        weights = [w for w, t in zip(trust, trajectories, strict=True) if is_weighed(t)]
        sums = (sum(float(w.sum()) for w in weights), sum(int((w >= bound).sum()) for w in weights))
        self.trust = [*sums, sum(len(w) for w in weights)]

    def weighed(self, batch: Batch, trajectories: Sequence[Trajectory]) -> None:
        """Take in one optimizer step; its rows are those of the trajectories."""
        self.shares.add(batch, trajectories)
        self.lessons.add(trajectories, batch.rows)

    def taught(self, scores: Sequence[Tensor | None]) -> None:
        """Take in what a teacher scored of this rank's responses of one step, a value each token; None: nothing."""
        self.scores = [*(self.scores or []), *scores]

    def stepped(self, report: StepReport, clipped: int) -> None:
        """Take in what an optimizer step was.

        Args:
            clipped: tokens of this rank that a clip of the method's own held back (:meth:`Method.clipped`). The report
                counts clips within surrogates only.
        """
        share = self.ranks.sum_counts([clipped])[0] / max(report.trained_tokens, 1)
        self.reports.append(replace(report, clip_share=report.clip_share + share))

    def observer(self, trajectories: Sequence[Trajectory], rows: Sequence[Row]) -> Observer | None:
        """For :meth:`Trainer.step` on these trajectories' rows."""
        # only before the first optimizer step of a batch do sampler and trainer hold the same weights
        observers = [] if self.reports else [self.mismatch.observer(trajectories)]
        kept = self.tokens.observer(trajectories, rows)
        return each_of([*observers, *self.lessons.observers(rows), *([kept] if kept else [])])

    def line(
        self,
        context: StageContext,
        sampler: RolloutSampler,
        composed: Sequence[Trajectory],
        rate: float,
        seconds: float,
    ) -> dict[str, Any]:
        """One line of metrics over all ranks; of several optimizer steps the means, except the largest gradient norm.

        Args:
            composed: what the method made of the batch, before responses that nobody can judge were left out.
            rate: learning rate of the first optimizer step.
            seconds: how long the batch took.
        """
        taken = [report for report in (*self.reports, *self.side) if report.rows] or [*self.reports, *self.side]
        main = [report for report in self.reports if report.rows] or taken
        tokens = sum(report.tokens for report in taken)
        trained = sum(report.trained_tokens for report in taken)
        facts, sampled = sampled_facts(sampler.seen, self.ranks)
        taught, scored = self._by_the_teacher()
        line = {
            "loss": _mean([r.loss for r in main]),
            "grad_norm": max((r.grad_norm for r in main), default=0.0),
            "lr": rate,
            "entropy": _mean([r.entropy for r in main]),
            "clip_share": _mean([r.clip_share for r in main]),
            **facts,
            "mismatch_kl": self.mismatch.mean(self.ranks),
            "sequences": sum(report.rows for report in taken),
            "tokens": tokens,
            "trained_tokens": trained,
            "sampled_tokens": int(sampled),
            "flops": rule_flops(context.n_parameters, trained, sampled, scored),
            "seconds": seconds,
            "sample_seconds": sampler.seconds,
            "train_seconds": sum(r.seconds for r in taken),
            "tokens_per_s": tokens / seconds,
            **taught,
        }
        if unused := self._unused(composed, int(sampled)):
            line["unused_tokens"] = unused
        if skipped := sum(report.skipped for report in taken):
            line["skipped_steps"] = skipped
        if self.trust is not None:
            weights, cut, number = self.ranks.sum_floats(torch.tensor(self.trust, dtype=torch.float64)).tolist()
            if number:
                line |= {"importance": weights / number, "importance_cut": cut / number}
        if self.side:
            line |= {"side_steps": len(self.side), "side_loss": _mean([r.loss for r in self.side])}
        line |= self.lessons.line(composed, len(sampler.seen))
        if mixed := self.shares.mixed():
            line["shares"] = mixed
        return line

    def _unused(self, composed: Sequence[Trajectory], sampled: int) -> int:
        """Tokens over all ranks of responses that were sampled and are not in the batch: groups that were dropped,
        given up or in excess, and rollouts that others took the place of."""
        return sampled - self.ranks.sum_counts([sum(t.sampled_tokens for t in composed)])[0]

    def _by_the_teacher(self) -> tuple[dict[str, float], int]:
        """``taught_share``, the share of the responses that a teacher scored, and how many tokens it scored.

        Over all ranks. Without a teacher: nothing, and 0.
        """
        scores = self.scores or []
        known = [logp for logp in scores if logp is not None]
        asked, some, all_of, tokens = self.ranks.sum_counts(
            [int(self.scores is not None), len(known), len(scores), sum(map(len, known))]
        )
        return ({"taught_share": some / max(all_of, 1)} if asked else {}), tokens


def sampled_facts(seen: Sequence[Trajectory], ranks: Ranks) -> tuple[dict[str, Any], float]:
    """Rewards, lengths and verdicts of all that was sampled, trained or not, and how many tokens that was.

    The mean reward is over the responses that have one; for the accuracy, one that nobody can judge counts as not
    right, as in evaluation. There is no accuracy (None) where a score is a degree without a threshold.
    """
    scores = torch.tensor(scores_of(seen), dtype=torch.float64)
    sums = [
        len(seen),
        float(scores.sum()),
        float(scores.square().sum()),
        sum(t.verdict == "right" for t in seen),
        sum(t.verdict == "unknown" for t in seen),
        sum(t.finish == "length" for t in seen),
        sum(t.sampled_tokens for t in seen),
        len(scores),
        sum(t.verdict == "graded" for t in seen),
    ]
    summed = ranks.sum_floats(torch.tensor(sums, dtype=torch.float64)).tolist()
    count, total, squares, right, unknown, truncated, sampled, known, graded = summed
    n, scored = max(count, 1), max(known, 1)
    facts = {
        "reward": total / scored,
        "reward_std": max(0.0, squares / scored - (total / scored) ** 2) ** 0.5,
        "accuracy": None if graded else right / n,
        "unknown": int(unknown),
        "unknown_share": unknown / n,
        "truncated": truncated / n,
        "response_tokens": sampled / n,
        **_component_means(seen, ranks),
        **_turn_facts(seen, ranks),
    }
    return facts, sampled


def _turn_facts(seen: Sequence[Trajectory], ranks: Ranks) -> dict[str, float]:
    """Of rollouts in an environment: turns and observation tokens a rollout, the shares of those that a limit ended,
    and how many their environment ended by an error or by taking too long. Without an environment: nothing."""
    played = [t for t in seen if t.transcript or t.finish in FAILURES]
    sums = [
        len(played),
        sum(t.turns for t in played if t.response_ids),
        sum(t.observation_tokens for t in played),
        *(sum(t.finish == end for t in played) for end in ("turns", "context", *FAILURES)),
    ]
    count, turns, tokens, cut, full, errors, late = ranks.sum_counts(sums)
    if not count:
        return {}
    return {
        "turns": turns / count,
        "observation_tokens": tokens / count,
        "turn_limit": cut / count,
        "context_limit": full / count,
        "environment_errors": errors,
        "environment_timeouts": late,
    }


def _component_means(seen: Sequence[Trajectory], ranks: Ranks) -> dict[str, float]:
    """The mean of every component of the reward over the responses that have it, as ``reward/NAME``."""
    sums: dict[str, tuple[float, int]] = {}
    for trajectory in seen:
        for name, value in trajectory.components:
            total, count = sums.get(name, (0.0, 0))
            sums[name] = (total + value, count + 1)
    every = ranks.gather(sums)
    names = dict.fromkeys(name for own in every for name in own)
    found = {name: [own[name] for own in every if name in own] for name in names}
    return {f"reward/{name}": sum(t for t, _ in own) / sum(n for _, n in own) for name, own in found.items()}


class Shares:
    """How much of a step's weight lies on which kind of token: own responses, demonstrations, prefixes, replays."""

    KINDS = ("rollout", "demonstration", "prefix", "replay")

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.sums = torch.zeros(len(self.KINDS), dtype=torch.float64)

    def add(self, batch: Batch, trajectories: Sequence[Trajectory]) -> None:
        """Add the absolute weights of a batch over their normalisers' constants, surrogates with a slope of their own
        (shaped probabilities) counted as they stand."""
        own = all(t.origin == "rollout" and not t.prefix for t in trajectories)
        if self.ranks.world == 1 and own and not self.sums.any():
            return
        divisor_J = torch.tensor(divisors(batch.terms, self.ranks.sum_counts(local_counts(batch))), dtype=torch.float64)
        for trajectory, row in zip(trajectories, batch.rows, strict=True):
            size_n = (row.weights.abs() / divisor_J[:, None]).sum(0)
            self.sums[self.KINDS.index(trajectory.origin)] += size_n[trajectory.prefix :].sum()
            self.sums[self.KINDS.index("prefix")] += size_n[: trajectory.prefix].sum()

    def mixed(self) -> dict[str, float]:
        """Share of each kind, over all ranks; empty where only the policy's own tokens were trained."""
        sums = self.ranks.sum_floats(self.sums.clone())
        if not sums[1:].any():
            return {}
        return {kind: float(x) for kind, x in zip(self.KINDS, sums / sums.sum(), strict=True) if x}


class Mismatch:
    """How far the sampler's log-probabilities lie from the trainer's for the same tokens.

    Both have the same weights, unless the responses were sampled ahead: the sampler's are those of its version then.

    Only of responses that the policy sampled whole; demonstrations, continuations and replays are passed over.
    """

    def __init__(self) -> None:
        self.kl_sum = self.tokens = self.largest = 0.0

    def observer(self, trajectories: Sequence[Trajectory]) -> Observer:
        """For :meth:`Trainer.step`: the batch's rows are those of these trajectories."""

        def observe(group: Sequence[int], stats: TokenStats) -> None:
            rows = [trajectories[i] for i in group]
            parts = stats.logp_T.double().cpu().split([len(row.response_ids) for row in rows])
            for row, trained in zip(rows, parts, strict=True):
                if row.sampler_logps is not None and is_weighed(row) and len(trained):
                    sampled = torch.tensor(row.sampler_logps, dtype=torch.float64)
                    self.kl_sum += float(kl_estimate(sampled, trained).sum())
                    self.tokens += len(trained)
                    self.largest = max(self.largest, float((sampled - trained).abs().max()))

        return observe

    def mean(self, ranks: Ranks) -> float | None:
        """KL a token over all ranks, nats; None where no token was compared."""
        sums = torch.tensor([self.kl_sum, self.tokens], dtype=torch.float64)
        kl, compared = ranks.sum_floats(sums).tolist()
        return kl / compared if compared else None


def is_weighed(trajectory: Trajectory) -> bool:
    """Whether the policy sampled a response as it stands, so that its tokens have an importance weight."""
    return trajectory.sampler_logps is not None and trajectory.origin == "rollout"


def stale_facts(batch: DueBatch, ranks: Ranks, seconds: float) -> dict[str, float]:
    """What the line of a step says of responses that were sampled ahead: ``staleness``, how many steps older than the
    policy the weights were that sampled a token, on average over all ranks; ``waited_share``, the share of the step
    that waited for its batch. Where a checkpoint before the step waited for batches, that counts as a part of the step.

    Args:
        seconds: that the step took.
    """
    sampled = [(t.sampled_tokens, batch.step - t.version) for t in batch.sampler.seen if t.version is not None]
    sums = [float(sum(n * lag for n, lag in sampled)), float(sum(n for n, _ in sampled))]
    lags, tokens = ranks.sum_floats(torch.tensor(sums, dtype=torch.float64)).tolist()
    return {
        "staleness": lags / max(tokens, 1),
        "waited_share": (batch.waited + batch.waited_before) / (seconds + batch.waited_before),
    }


def keep_samples(context: StageContext, kept: Sequence[Trajectory], step: int, tokens: TokenFigures) -> None:
    """Write responses of a step for the reader; a crash can lose them, a resumed run writes them again."""
    path = context.folder.stage(context.name) / "samples.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for trajectory in kept:
        line = rollout_line(trajectory, stage=context.name, step=step)
        line |= {} if trajectory.version is None else {"version": trajectory.version}
        line |= {"versions": trajectory.versions} if trajectory.versions else {}
        weighed = tokens.of(trajectory, context.tokenizer)
        lines.append(line if weighed is None else line | {"weighed": weighed})
    append_jsonl(path, lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)

"""Validation: a training stage's model measured on test sets while it trains, and the step whose model was best.

Nothing of it enters the training: the random numbers of a response follow from the recipe's seed and the test set, as
in an evaluation, and no generator is shared. So the trained bits are those of a stage that measures nothing, and the
value after a step is what an eval stage measures on that step's model.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from thence.data.order import stable_seed
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import CheckpointError, RecipeError
from thence.evaluate.metrics import avg_at_k, mean_reward_of
from thence.models.lengths import context_of
from thence.pipeline.context import StageContext
from thence.pipeline.ground import rows_digest
from thence.pipeline.prompts import check_answers
from thence.pipeline.regimes import SEVERE
from thence.pipeline.rewards import reward_names, stage_reward
from thence.pipeline.room import response_tokens
from thence.pipeline.test_sets import MeasuredSet, measured_sets
from thence.recipe import Eval, Optimization, Recipe, Sft
from thence.rollout.native import Sampling
from thence.rollout.responses import respond
from thence.train.checkpoint import damaged_file
from thence.train.parallel import together
from thence.train.state import load_weights
from thence.train.weights import whole
from thence.verify.grader import Grader

log = logging.getLogger(__name__)
HELD_OUT, MEAN, OF_SET = "held_out_loss", "eval", "eval/"
"""Keys of the metrics: the loss on held-out demonstrations, the mean over test sets, and, with its name, a test set."""


def check_validation(recipe: Recipe, name: str) -> None:
    """Refuse settings of a training stage's validation that do not go together. Raises RecipeError."""
    stage = recipe.stage(name)
    if not isinstance(stage, Optimization):
        return
    if isinstance(stage, Sft) and stage.held_out and recipe.stage_data(stage.data).weights is not None:
        raise RecipeError(
            "data.weights may repeat rows, so a row could be held out and trained too",
            remedy=f"leave {name}.held_out out, and measure on a test set with {name}.eval_every",
            field=f"{name}.held_out",
        )
    _check_stop(stage, name)
    sets = [found.name for found in measured_sets(recipe, name)]
    for field in ("eval_on", "eval_limit"):
        if getattr(stage, field) and stage.eval_every is None:
            raise RecipeError(
                f"{field} is for measurements while training, and there are none",
                remedy=f"set {name}.eval_every to the steps between them, or leave {field} out",
                field=f"{name}.{field}",
            )
    if stage.patience is not None and best_metric(stage) is None:
        raise RecipeError(
            "patience waits for a better value, and keep_best does not say of what",
            remedy=f'set {name}.keep_best, for example keep_best = "eval"',
            field=f"{name}.patience",
        )
    known = [MEAN, *(OF_SET + key for key in sets)] if sets else []
    if isinstance(stage, Sft) and stage.held_out:
        known.append(HELD_OUT)
    if stage.keep_best is not None and stage.keep_best not in known:
        more = "" if isinstance(stage, Sft) and stage.held_out else f" or {name}.held_out"
        raise RecipeError(
            f"the stage does not measure {stage.keep_best!r}",
            remedy=f"give one of: {', '.join(known)}"
            if known
            else f"set {name}.eval_every{more if isinstance(stage, Sft) else ''}",
            field=f"{name}.keep_best",
        )


def _check_stop(stage: Optimization, name: str) -> None:
    """Refuse to end a stage by a held-out loss that it does not measure, or beside another choice of the best step."""
    if not isinstance(stage, Sft) or stage.stop is None:
        return
    if not stage.held_out:
        raise RecipeError(
            f'stop = "{stage.stop}" looks at the loss of held-out examples, and there are none',
            remedy=f"set {name}.held_out to a number of examples, for example 100, or leave {name}.stop out",
            field=f"{name}.stop",
        )
    if stage.keep_best not in (None, HELD_OUT):
        raise RecipeError(
            f'stop = "{stage.stop}" leaves the model of the smallest held-out loss, not that of the best '
            f"{stage.keep_best}",
            remedy=f"leave {name}.keep_best out, or {name}.stop (then {name}.patience can end the stage)",
            field=f"{name}.keep_best",
        )


def best_metric(stage: Optimization) -> str | None:
    """The key of the metrics that chooses the stage's model; None: its last step's model stays."""
    return HELD_OUT if isinstance(stage, Sft) and stage.stop is not None else stage.keep_best


@dataclass(frozen=True)
class MeasuredPart:
    """A test set as a training stage measures it.

    Args:
        of: which.
        prompts: its prompts, cut to ``eval_limit``.
        sampling, seed_parts: how responses are sampled, and what their random numbers follow from.
        samples: responses a problem.
        grader: gives the verdicts.
    """

    of: MeasuredSet
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    seed_parts: tuple[object, ...]
    samples: int
    grader: Grader


class Validation:
    """Measures a stage's model while it trains, and knows which step's model was the best. All ranks call it.

    Args:
        held: closes the graders when the stage ends.

    Raises:
        DataError, RecipeError: a test set that cannot be read or graded.
    """

    def __init__(self, context: StageContext, stage: Optimization, held: ExitStack):
        self.context, self.stage = context, stage
        self.parts = [_part(context, stage, found, held) for found in measured_sets(context.recipe, context.name)]
        metric, self.best = best_metric(stage), None
        if metric is not None:
            worst = SEVERE if isinstance(stage, Sft) and stage.stop is not None else math.inf
            self.best = Best(metric, stage.patience, self._measured(metric), worst)

    def resume(self, own: Mapping[str, Any]) -> None:
        """Take up what the last checkpoint kept of the best step; empty: nothing."""
        kept = own.get("best")
        if self.best is not None and kept:
            self.best.restore(kept, self.context)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: nothing where no step is chosen."""
        return {} if self.best is None else {"best": self.best.state()}

    @property
    def ended(self) -> bool:
        """Whether patience has run out, or the held-out loss is where ``stop`` ends the stage."""
        return self.best is not None and self.best.ended

    def measure(self, step: int, last: bool) -> dict[str, Any]:
        """What the line of metrics of a step says of the test sets; nothing where no measurement is due.

        Args:
            step: of the stage, counted from 1.
            last: whether the stage ends here.
        """
        every = self.stage.eval_every
        if every is None or (step % every and not last):
            return {}
        start = time.perf_counter()
        with whole(self.context.policy) as model:
            found = {part.of.name: self._value(part, model) for part in self.parts}
        line: dict[str, Any] = {OF_SET + name: value for name, (value, _) in found.items()}
        values = [value for value, _ in found.values()]
        if len({kind for _, kind in found.values()}) == 1 and None not in values:
            line[MEAN] = math.fsum(value or 0.0 for value in values) / len(values)
        return line | {"eval_seconds": time.perf_counter() - start}

    def look(self, step: int, line: Mapping[str, Any]) -> bool:
        """Whether a step's model is the best so far, by its line of metrics. Raises RecipeError as the metric is not a
        number that steps can be compared by."""
        best = self.best
        if best is None or (best.metric not in line and "eval_seconds" not in line):
            return False
        if best.metric not in line and best.metric != HELD_OUT:
            raise RecipeError(
                "the test sets have no mean: some are measured by accuracy, others by a mean reward",
                remedy="name the one that counts: " + ", ".join(f"eval/{part.of.name}" for part in self.parts),
                field=f"{self.context.name}.keep_best",
            )
        better = best.metric in line and best.look(step, line[best.metric])
        if best.ended and self.context.leads:
            log.info("%s ends after step %d: %s", self.context.name, step, best.why())
        return better

    def facts(self) -> dict[str, Any]:
        """What ``done.json`` says of the best step; nothing where none is chosen."""
        best = self.best
        return {} if best is None or not best.step else {"best_step": best.step, "best": {best.metric: best.value}}

    def _value(self, part: MeasuredPart, model: Any) -> tuple[float | None, str]:
        """avg@samples, or the mean reward where scores are degrees (None: no response has one), and which it is."""
        context, ranks = self.context, self.context.ranks

        def share() -> list[tuple[str, float]]:
            mine = part.prompts[ranks.rank :: ranks.world]
            tokenizer, how = context.tokenizer, (part.sampling, part.seed_parts)
            found = respond(model, tokenizer, part.grader, mine, part.samples, *how) if mine else []
            return [_graded(trajectory) for trajectory in found]

        shares = ranks.gather(together(ranks, share))
        n = part.samples
        # in the order of the problems, so that any number of ranks adds up the same numbers in the same order
        places = [divmod(i, ranks.world) for i in range(len(part.prompts))]
        rows = [shares[rank][at * n : (at + 1) * n] for at, rank in places]
        if any(verdict == "graded" for row in rows for verdict, _ in row):
            scores = [[score for verdict, score in row if verdict != "unknown"] for row in rows]
            return (mean_reward_of(scores, n).value if any(scores) else None), "reward"
        return avg_at_k([sum(verdict == "right" for verdict, _ in row) for row in rows], n).value, "accuracy"

    def _measured(self, metric: str) -> str:
        """16 hex digits that follow from what is measured and how: other ones cannot be compared."""
        parts = [
            (p.of.name, rows_digest(p.prompts), str(p.sampling), p.samples, _named(p.of.stage), str(p.seed_parts))
            for p in self.parts
        ]
        held_out = self.stage.held_out if isinstance(self.stage, Sft) else 0
        return f"{stable_seed(metric, held_out, parts):016x}"


class Best:
    """The step of a stage whose model has the best value so far, and how long ago that was.

    Args:
        metric: the key of the metrics that is compared; of a loss less is better.
        patience: measurements without a better value after which the stage ends; None: any number.
        measured: what is measured, as a text.
        worst: the stage ends when a measurement reaches this multiple of the best one; for a loss.
    """

    def __init__(self, metric: str, patience: int | None, measured: str, worst: float = math.inf):
        self.metric, self.patience, self.measured, self.worst = metric, patience, measured, worst
        self.step, self.since = 0, 0
        self.value: float | None = None
        self.newest: float | None = None

    def look(self, step: int, value: float | None) -> bool:
        """Take in a measurement. Returns whether it is the best so far; the earlier of two equal ones is."""
        sign, self.newest = -1 if self.metric == HELD_OUT else 1, value
        better = value is not None and math.isfinite(value)
        if better and self.value is not None:
            better = sign * (value or 0.0) > sign * self.value
        if better:
            self.step, self.value, self.since = step, value, 0
        else:
            self.since += 1
        return better

    @property
    def ended(self) -> bool:
        """Whether there were as many measurements without a better value as patience allows, or one was too bad."""
        return (self.patience is not None and self.since >= self.patience) or self._too_bad

    @property
    def _too_bad(self) -> bool:
        if math.isinf(self.worst) or self.value is None or self.newest is None:
            return False
        return not self.newest < self.worst * self.value and self.newest != self.value

    def why(self) -> str:
        """Why the stage has ended, in words."""
        if self._too_bad:
            return (
                f"{self.metric} is {self.newest:.4g}, at least {self.worst:.2f} times the {self.value:.4g} of step "
                f"{self.step}"
            )
        return f"{self.since} measurements of {self.metric} were no better than that of step {self.step}"

    def state(self) -> dict[str, Any]:
        """Plain values."""
        return {"metric": self.metric, "measured": self.measured, **self._so_far()}

    def _so_far(self) -> dict[str, Any]:
        return {"step": self.step, "value": self.value, "since": self.since, "newest": self.newest}

    def restore(self, kept: Mapping[str, Any], context: StageContext) -> None:
        """Take up the inverse of :meth:`state`; values of another measurement are left, which the log says."""
        if (kept["metric"], kept["measured"]) == (self.metric, self.measured):
            self.step, self.value, self.since = kept["step"], kept["value"], kept["since"]
            self.newest = kept.get("newest")  # a checkpoint of an older version has none
        elif context.leads:
            log.warning(
                "%s: keep_best, or what it measures, has changed; the best step is sought from here on", context.name
            )


def take_best(context: StageContext, facts: Mapping[str, Any]) -> None:
    """Give the context's model the weights of the stage's best step, if it keeps one. All ranks call it.

    Args:
        facts: what the stage has found: ``best_step`` and ``steps``.

    Raises:
        CheckpointError: the checkpoint of that step is gone or damaged.
    """
    step = facts.get("best_step")
    if step is None or step == facts.get("steps"):
        return
    place = context.folder.stage(context.name) / "checkpoints" / f"step-{step:06d}"
    wrong = damaged_file(place)
    if any(context.ranks.gather(wrong is not None)):
        raise CheckpointError(
            f"step {step} is the best of stage {context.name}, and its checkpoint is "
            + ("not as it was written" if place.is_dir() else "not there any more"),
            remedy="put it back; or run the stage again: the same command with --repeat " + context.name,
            file=wrong or place,
        )
    load_weights(context.model, place)
    if context.leads:
        log.info("stage %s leaves the model of step %d, the best one", context.name, step)


def _part(context: StageContext, stage: Optimization, found: MeasuredSet, held: ExitStack) -> MeasuredPart:
    evaluation = found.stage
    prompts = tuple(context.load_prompts(found.table)[: stage.eval_limit])
    check_answers(prompts, reward_names(evaluation))
    temperature = evaluation.temperatures[0]
    limit = context_of(context.model.config)
    sampling = Sampling(
        max_tokens=response_tokens(found.owner, evaluation, prompts, limit, say=False),
        temperature=temperature,
        top_p=evaluation.top_p,
        stop_ids=context.stop_ids(context.recipe.stage_data(found.table)),
        rows=evaluation.rollout_rows,
    )
    seed_parts = (context.recipe.seed, "eval", found.name, temperature)
    grader = held.enter_context(stage_reward(evaluation, context.chat(context.recipe.stage_data(found.table))))
    return MeasuredPart(found, prompts, sampling, seed_parts, evaluation.samples, grader)


def _named(stage: Eval) -> str:
    """What gives the verdicts."""
    environment = stage.environment
    return stage.reward if environment is None else str(environment.model_dump(exclude={"seconds", "processes"}))


def _graded(trajectory: Trajectory) -> tuple[str, float]:
    return str(trajectory.verdict), float(trajectory.score or 0.0)

"""The teacher of self-distillation: what it reads, who it is, and what it says of the policy's responses."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from thence.data.chat import chat_format, end_token_ids, render
from thence.data.example import Example
from thence.data.guidance import asked_anew, filled
from thence.data.problems import RowProblem
from thence.data.response import response_text
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import DataError, RecipeError
from thence.methods.base import Method, bare_row
from thence.methods.teaching import Teacher
from thence.models.lengths import context_of
from thence.objective import BareRow, distils
from thence.pipeline.context import StageContext
from thence.pipeline.prompts import examples_of
from thence.pipeline.rehearsal import no_demonstrations
from thence.recipe import Data, Recipe, Rl
from thence.train.average import MovingAverage
from thence.train.policy import Policy, Scorer
from thence.train.step import policy_statistics
from thence.train.trainer import Trainer

log = logging.getLogger(__name__)
PROMPT, SOLUTION = "{prompt}", "{solution}"
FROM_THE_MODEL = (
    "{0}: a response cannot be shown to the teacher ({1}); what it would have taught has no weight. This is said once"
)


class TeacherPrompts:
    """Renders a table's prompts with a solution in them, as the table renders prompts.

    Args:
        data: the table.
        stop_ids: all tokens that end a response.
    """

    def __init__(self, teacher: Teacher, data: Data, tokenizer: Any, stop_ids: Sequence[int]):
        self.form, self.data, self.tokenizer, self.stop_ids = teacher.form, data, tokenizer, stop_ids
        self.chat = chat_format(tokenizer, data.template, data.template_variables)
        self.examples = examples_of(data, tokenizer)
        self._last: tuple[tuple[int, Sequence[int]], tuple[int, ...]] | None = None

    def text_of(self, prompt: Prompt, solution: Sequence[int]) -> str:
        """A response as the teacher reads it: its text without the end token."""
        return response_text(self.tokenizer, solution, self.stop_ids, prompt.opening)

    def token_ids(self, prompt: Prompt, solution: Sequence[int]) -> tuple[int, ...]:
        """The teacher's prompt.

        Args:
            solution: tokens of a response to the prompt.

        Raises:
            DataError: the last turn is not a user's, or the solution holds a token that ends turns.
        """
        key = (prompt.index, solution)
        if self._last is None or self._last[0] != key:  # all responses of a group may read the same
            self._last = (key, self._rendered(self.examples[prompt.index], self.text_of(prompt, solution)))
        return self._last[1]

    def _rendered(self, example: Example, solution: str) -> tuple[int, ...]:
        try:
            anew = asked_anew(example, lambda text: filled(self.form, {PROMPT: text, SOLUTION: solution}))
        except RowProblem as problem:
            raise problem.error(example.source) from problem
        return tuple(render(anew, self.tokenizer, system=self.data.system, template=self.chat).prompt_ids)


@dataclass
class TeacherPass:
    """Scores responses as the teacher, for the steps of an RL stage.

    Args:
        name: the stage's.
        scorer: holds the teacher's weights; None: the trainer's policy does, as it stands.
        limit: most tokens of a row; None: no limit.
    """

    name: str
    method: Method
    prompts: TeacherPrompts
    trainer: Trainer
    temperature: float
    scorer: Scorer | None = None
    limit: int | None = None
    told: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if distils(self.method.terms):
            self.trainer.policy.learn_from(self.scorer or self.trainer.policy)

    def rows(self, trajectories: Sequence[Trajectory]) -> list[BareRow | None]:
        """What the teacher reads of each trajectory: its response behind the teacher's prompt. None: it has no teacher.

        Args:
            trajectories: whole groups of one optimizer step.
        """
        shown = zip(trajectories, self.method.solutions(trajectories), strict=True)
        return [self._row(trajectory, solution) for trajectory, solution in shown]

    def logps(self, trajectories: Sequence[Trajectory]) -> list[Tensor | None]:
        """The teacher's log-probabilities of each trajectory's response tokens, shape (n,), nats; None: it has none.

        All ranks ask.

        Args:
            trajectories: whole groups of one optimizer step.
        """
        rows = {i: row for i, row in enumerate(self.rows(trajectories)) if row is not None}
        scored = iter(self._scored(list(rows.values())))
        return [next(scored) if i in rows else None for i in range(len(trajectories))]

    def _row(self, trajectory: Trajectory, solution: Sequence[int] | None) -> BareRow | None:
        if solution is None or not trajectory.response_ids:
            return None
        try:
            ids = self.prompts.token_ids(trajectory.prompt, solution)
        except DataError as error:
            return self._say(error.problem)
        size = len(ids) + len(trajectory.response_ids)
        if self.limit is not None and size > self.limit:
            return self._say(f"with it a row has {size:,} tokens, and the model's context {self.limit:,}")
        anew = Trajectory(Prompt(trajectory.prompt.index, ids), trajectory.response_ids)
        return bare_row(anew)

    def _scored(self, rows: Sequence[BareRow]) -> list[Tensor]:
        trainer = self.trainer
        if self.scorer is None:
            return [logp for logp, _ in trainer.statistics(rows, self.temperature)]
        if trainer.meter is not None:
            trainer.meter.scored([len(row.token_ids) for row in rows], sum(row.n_trained for row in rows))
        found = policy_statistics(self.scorer, rows, self.temperature, trainer.settings, trainer.ranks)
        return [logp for logp, _ in found]

    def _say(self, why: str) -> None:
        if "model" not in self.told:
            self.told.add("model")
            log.warning(FROM_THE_MODEL.format(self.name, why))


def teacher_weights(context: StageContext, method: Method) -> Scorer | None:
    """The copy that holds the teacher's weights as the stage starts; None: there is none but the policy."""
    teacher = method.teacher
    return context.frozen_policy() if teacher is not None and teacher.weights != "current" else None


def teacher_pass(
    context: StageContext, stage: Rl, method: Method, trainer: Trainer, scorer: Scorer | None
) -> TeacherPass | None:
    """The teacher of a stage; a moving average becomes part of the trainer. None: the method has no teacher.

    Args:
        scorer: what :func:`teacher_weights` gave.
    """
    teacher = method.teacher
    if teacher is None:
        return None
    if teacher.weights == "average":
        assert isinstance(scorer, Policy), "adapters have no moving average: see check_teacher"
        trainer.average = MovingAverage(scorer, teacher.rate)
    data = context.recipe.stage_data(stage.data)
    prompts = TeacherPrompts(teacher, data, context.tokenizer, context.stop_ids(data))
    limit = context_of(context.model.config)
    return TeacherPass(context.name, method, prompts, trainer, stage.temperature, scorer, limit)


def drawn_prompts(method: Method, prompts: Sequence[Prompt], name: str, *, say: bool = False) -> list[Prompt]:
    """The prompts that a stage draws: all, or those with a demonstration where the teacher reads it.

    Args:
        name: the stage's.
        say: log how many are left out.

    Raises:
        DataError: none is left.
    """
    if method.demonstrations != "shown":
        return list(prompts)
    found = [prompt for prompt in prompts if prompt.demonstration_ids]
    if not found:
        raise no_demonstrations()
    if say and len(found) < len(prompts):
        log.warning(
            "%s: %d of %d prompts have no demonstration that the teacher could read; they are not drawn",
            *(name, len(prompts) - len(found), len(prompts)),
        )
    return found


def check_teacher(recipe: Recipe, name: str, method: Method) -> None:
    """Refuse a teacher that a recipe cannot have. Raises RecipeError."""
    teacher = method.teacher
    if teacher is not None and teacher.weights == "average" and recipe.model.lora is not None:
        raise RecipeError(
            "a moving average of adapters is not kept",
            remedy='set teacher = "start" (adapters off) or "current" in its options, or leave model.lora out',
            field=f"{name}.options.teacher",
        )
    stage = recipe.stage(name)
    if distils(method.terms) and isinstance(stage, Rl) and stage.fault is not None:
        raise RecipeError(
            "a fault makes rows of its own, which no teacher reads",
            remedy='set divergence = "sampled" in its options, or leave the fault out',
            field=f"{name}.options.divergence",
        )


def check_teacher_rows(
    name: str,
    method: Method,
    data: Data,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    room: int,
    context: int | None,
) -> None:
    """Refuse a teacher's prompts that cannot be rendered or leave no room for a response.

    A demonstration is what it is. A right response is counted with all the tokens that it may have.

    Args:
        prompts: those that the stage draws.
        room: the longest response, tokens.
        context: most tokens of a row; None: no limit.

    Raises:
        DataError: a row's last turn is not a user's, or its teacher's prompt is too long.
        RecipeError: the form is written in characters that the tokenizer does not know.
    """
    if method.teacher is None:
        return
    made = TeacherPrompts(method.teacher, data, tokenizer, end_token_ids(tokenizer, data.template))
    shown = method.demonstrations == "shown"
    longest, owner = 0, prompts[0]
    for prompt in prompts:
        solution = prompt.demonstration_ids or () if shown else ()
        ids = made.token_ids(prompt, solution)
        _check_known(name, method.teacher, tokenizer, ids, (*prompt.token_ids, *solution))
        if len(ids) > longest:
            longest, owner = len(ids), prompt
    parts = 1 if shown else 2  # of a row's room: a response, and before it the right one that the teacher reads
    if context is None or longest + parts * room <= context:
        return
    least = (context - longest) // parts
    if least > 0:
        remedy = f"--{name}.max-tokens {least}"
    else:
        part = context // 4
        cut = f" --{name}.data.max-response-tokens {part}" if shown else ""
        remedy = f"leave long prompts out: --{name}.data.max-prompt-tokens {part}{cut} --{name}.max-tokens {part}"
    holds = "its demonstration in it" if shown else "no solution in it yet"
    more = "a response" if shown else "a solution and a response"
    raise DataError(
        f"the teacher's prompt of example {owner.index + 1} has {longest:,} tokens with {holds}; {more} of up to "
        f"{room:,} more exceed the model's context of {context:,}",
        remedy=remedy,
        field=f"{name}.max_tokens",
    )


def _check_known(name: str, teacher: Teacher, tokenizer: Any, ids: Sequence[int], given: Sequence[int]) -> None:
    """Raise RecipeError where the form brings unknown tokens into a prompt that has none."""
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in ids and unknown not in given:
        raise RecipeError(
            f"the teacher's question is written in characters that the tokenizer does not know: {teacher.form!r}",
            remedy="give a form in the model's characters, for example {solution}{prompt}",
            field=f"{name}.options.form",
        )


def scored_tokens(scores: Sequence[Tensor | None]) -> int:
    """Response tokens that a teacher scored."""
    return sum(len(logp) for logp in scores if logp is not None)

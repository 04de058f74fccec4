"""Rollouts of several turns: the policy writes, an environment of the user's own answers, until one of them ends it.

What the environment says is context. It lies between the policy's turns in the row that the model reads, and no step
trains it. What the policy has sampled stays as it is, token by token.

How a rollout ends (`Trajectory.finish`), and what its score is:

    stop      the environment said that it is done
    length    `max_tokens`, over the policy's tokens of all turns, were used up; a turn that is cut by that is not
              handed to the environment
    turns     `max_turns` were taken, and the environment was not done
    context   the next observation does not fit into `max_observation_tokens` or the model's context; it is not read
    timeout   a reset or step took too long: nobody can tell the score
    error     the environment failed (with `on_error = "unknown"`): nobody can tell the score

The first four have the rewards that were given so far. One that is done with a last reward of None has no score.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from thence.data.observation import ObservationForm, observation_form
from thence.data.order import stable_seed
from thence.data.response import response_text
from thence.data.template import ChatFormat
from thence.data.trajectory import Observation, Prompt, Said, Trajectory
from thence.errors import DataError, UserError
from thence.foreign_text import one_line
from thence.recipe.tables import Environment
from thence.rollout.environments import EnvironmentPool, Failure, Played, Step
from thence.rollout.native import Response, Sampling
from thence.verify.grader import Grader
from thence.verify.own_function import SLOW_IN_A_ROW, Stated
from thence.verify.verdict import Grade, Verdict, unknown

Ask = Callable[[Sequence[Sequence[int]], Sequence[int], Sequence[int]], Sequence[Response]]
"""Samples one response for each row of token ids, with a seed and a largest length each."""


@dataclass
class _Rollout:
    """A rollout under way.

    Attributes:
        prompt: with the first observation, if there is one.
        seed: of its random numbers; later turns have seeds that follow from it.
        ids, logps: what the policy has sampled.
        context: all that the policy reads: prompt, its own tokens, observations.
        opening: the think tag that the present turn begins with.
        finish: how it ended; empty: it goes on.
    """

    prompt: Prompt
    seed: int
    played: Played
    context: list[int]
    opening: str
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)
    transcript: list[Said] = field(default_factory=list)
    rewards: list[float | None] = field(default_factory=list)
    finish: str = ""
    reason: str = ""

    def fail(self, failure: Failure) -> None:
        """End it: nobody can tell its score."""
        self.finish, self.reason = failure.finish, failure.reason

    @property
    def observed(self) -> int:
        """Tokens of its observations between turns."""
        return sum(len(observation.token_ids) for observation in self.observations)


class Player(Grader):
    """Plays rollouts in the user's environments, which grade them by their rewards.

    As a grader of single responses it takes each for the first and only turn.

    Args:
        settings: of the environment.
        right_from: the lowest score that is right; default: what the class states, else 1 is right and 0 wrong.
        chat: the chat template of the prompts; None: no rollout is played here.
        processes: instead of those of the settings.
        slow_in_a_row: so many steps in a row that take too long are an error.

    Raises:
        UserError: the class cannot be loaded.
    """

    def __init__(
        self,
        settings: Environment,
        right_from: float | None = None,
        chat: ChatFormat | None = None,
        processes: int | None = None,
        slow_in_a_row: int = SLOW_IN_A_ROW,
    ):
        self.settings, self.chat = settings, chat
        most = slow_in_a_row if settings.on_error == "stop" else None
        self._pool = EnvironmentPool(settings.path, settings.seconds, processes or settings.processes, most)
        self.threshold = self._pool.stated if right_from is None else Stated(True, right_from)
        self._form: ObservationForm | None = None

    def close(self) -> None:
        self._pool.close()

    def grade_many(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        answers: Sequence[str | None],
        columns: Sequence[str] | None = None,
    ) -> list[Grade]:
        others = [""] * len(prompts) if columns is None else columns
        rows = [row_of(p, a, c) for p, a, c in zip(prompts, answers, others, strict=True)]
        wheres = [f"response {i} (prompt {_short(p)})" for i, p in enumerate(prompts, start=1)]
        begun = self._pool.begin(rows, [0] * len(rows), wheres)
        going = [i for i, (_, first) in enumerate(begun) if not isinstance(first, Failure)]
        steps = dict(
            zip(going, self._pool.step([begun[i][0] for i in going], [responses[i] for i in going]), strict=True)
        )
        self._pool.end([played for played, _ in begun])
        return [self._of_one_turn(steps.get(i, first)) for i, (_, first) in enumerate(begun)]

    def form(self, tokenizer: Any) -> ObservationForm:
        """How observations are written. Raises UserError where the chat template cannot write them."""
        assert self.chat is not None, "a player of rollouts is given the chat format of their prompts"
        if self._form is None or self._form.tokenizer is not tokenizer:
            self._form = observation_form(tokenizer, self.chat, self.settings.role)
        return self._form

    def play(
        self,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        sampling: Sampling,
        ask: Ask,
        limit: int | None,
    ) -> list[Trajectory]:
        """One rollout for every prompt, scored.

        Args:
            prompts: one a rollout.
            seeds: of each rollout. The random numbers of its turns follow from it and from the turn alone.
            ask: samples the turns.
            limit: most tokens that the model can read; None: any number.
        """
        check_prompts(self.form(tokenizer), prompts)
        rollouts = self._begun(prompts, seeds, limit, sampling)
        for turn in range(self.settings.max_turns):
            going = [rollout for rollout in rollouts if not rollout.finish]
            if not going:
                break
            rooms = [_room(rollout, sampling, limit) for rollout in going]
            turn_seeds = [stable_seed(r.seed, "turn", turn) if turn else r.seed for r in going]
            found = ask([rollout.context for rollout in going], turn_seeds, rooms)
            for rollout, response in zip(going, found, strict=True):
                self._said(tokenizer, rollout, response, sampling)
            self._answered([r for r in going if not r.finish], turn, sampling, limit)
        self._pool.end([rollout.played for rollout in rollouts])
        return [self._trajectory(tokenizer, rollout, sampling) for rollout in rollouts]

    def _begun(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], limit: int | None, sampling: Sampling
    ) -> list[_Rollout]:
        rows = [row_of(prompt.text, prompt.answer, prompt.columns) for prompt in prompts]
        wheres = [f"{_place(prompt)} (prompt {_short(prompt.text)})" for prompt in prompts]
        env_seeds = [stable_seed(seed, "environment") for seed in seeds]
        rollouts, begun = [], self._pool.begin(rows, env_seeds, wheres)
        for prompt, seed, (played, first) in zip(prompts, seeds, begun, strict=True):
            rollout = _Rollout(prompt, seed, played, list(prompt.token_ids), prompt.opening)
            rollouts.append(rollout)
            if isinstance(first, Failure):
                rollout.fail(first)
            elif first is not None:
                rollout.transcript.append(("environment", first))
                self._read_first(rollout, first, limit, sampling)
        return rollouts

    def _read_first(self, rollout: _Rollout, text: str, limit: int | None, sampling: Sampling) -> None:
        """Put a first observation into the prompt; one that leaves no room is an error of the environment."""
        assert self._form is not None
        size = len(rollout.context)
        try:
            rollout.context = self._form.begun(rollout.context, text)
            most = self.settings.max_observation_tokens
            if (tokens := len(rollout.context) - size) > most or _room(rollout, sampling, limit) < 1:
                raise UserError(
                    f"environment {self.settings.path}: the first observation has {tokens:,} tokens, which leaves no "
                    f"room for a turn, on {rollout.played.where}",
                    remedy=f"let reset return a shorter one; max_observation_tokens is {most:,}",
                )
        except UserError as error:
            rollout.context = list(rollout.prompt.token_ids)
            rollout.fail(self._pool.failed(rollout.played, error))
            return
        rollout.prompt = replace(rollout.prompt, token_ids=tuple(rollout.context), asked=rollout.prompt.token_ids)
        rollout.opening = self._form.opening

    def _said(self, tokenizer: Any, rollout: _Rollout, response: Response, sampling: Sampling) -> None:
        """Take in a turn of the policy."""
        rollout.ids += response.token_ids
        rollout.logps += response.logps
        rollout.context += response.token_ids
        text = response_text(tokenizer, response.token_ids, sampling.stop_ids, rollout.opening)
        rollout.transcript.append(("policy", text))
        if response.finish == "length":
            rollout.finish = "length" if len(rollout.ids) >= sampling.max_tokens else "context"

    def _answered(self, going: Sequence[_Rollout], turn: int, sampling: Sampling, limit: int | None) -> None:
        """Hand the turns to their environments, and put what they say behind them."""
        found = self._pool.step([r.played for r in going], [r.transcript[-1][1] for r in going])
        for rollout, step in zip(going, found, strict=True):
            if isinstance(step, Failure):
                rollout.fail(step)
                continue
            rollout.rewards.append(step.reward)
            if step.observation is not None:
                rollout.transcript.append(("environment", step.observation))
            if step.done:
                rollout.finish = "stop"
            elif turn + 1 == self.settings.max_turns:
                rollout.finish = "turns"
            elif len(rollout.ids) >= sampling.max_tokens:
                rollout.finish = "length"
            else:
                self._read(rollout, step.observation or "", sampling, limit)

    def _read(self, rollout: _Rollout, text: str, sampling: Sampling, limit: int | None) -> None:
        """Put an observation behind a turn, if there is room for it and for a token of the next turn."""
        assert self._form is not None
        try:
            ids = self._form.between(text, rollout.ids[-1])
        except UserError as error:
            problem = f"environment {self.settings.path}: {error.problem}, on {rollout.played.where}"
            rollout.fail(self._pool.failed(rollout.played, UserError(problem, remedy=error.remedy)))
            return
        if rollout.observed + len(ids) > self.settings.max_observation_tokens or (
            limit is not None and len(rollout.context) + len(ids) >= limit
        ):
            rollout.finish = "context"
            return
        rollout.observations.append(Observation(len(rollout.ids), tuple(ids)))
        rollout.context += ids
        rollout.opening = self._form.opening

    def _trajectory(self, tokenizer: Any, rollout: _Rollout, sampling: Sampling) -> Trajectory:
        made = Trajectory(
            rollout.prompt,
            tuple(rollout.ids),
            finish=rollout.finish,
            sampler_logps=tuple(rollout.logps),
            observations=tuple(rollout.observations),
            transcript=tuple(rollout.transcript),
        )
        grade = unknown(rollout.reason) if rollout.reason else self._graded(rollout.rewards, rollout.finish == "stop")
        text = response_text(tokenizer, made.after_prompt()[0], sampling.stop_ids, rollout.prompt.opening)
        return replace(made, text=text, score=grade.score, verdict=grade.verdict.value, reason=grade.reason)

    def _graded(self, rewards: Sequence[float | None], done: bool) -> Grade:
        """The grade of a rollout that ended with these rewards of its turns."""
        if done and rewards[-1] is None:
            return unknown("the environment was done and gave no reward")
        known = [reward for reward in rewards if reward is not None]
        score = math.fsum(known) if self.settings.score == "sum" else (known[-1] if known else 0.0)
        return Grade(self.threshold.verdict(score), score)

    def _of_one_turn(self, found: Step | Failure | str | None) -> Grade:
        if isinstance(found, Step):
            if found.done:
                return self._graded([found.reward], True)
            return Grade(Verdict.UNKNOWN, 0.0, reason="the environment was not done after this one turn")
        return unknown(found.reason if isinstance(found, Failure) else "the environment was not asked")


def check_prompts(form: ObservationForm, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts that do not end as the chat template opens a turn. Raises DataError."""
    wrong = next((prompt for prompt in prompts if not form.opens(prompt.token_ids)), None)
    if wrong is not None:
        raise DataError(
            f"the prompt of {_place(wrong)} does not end as the chat template opens a turn, so the turns "
            "after it cannot be written",
            remedy='give prompts as messages, or set data.template = "none": observations are then plain text',
            field="data.template",
        )


def _room(rollout: _Rollout, sampling: Sampling, limit: int | None) -> int:
    """The longest turn that fits now."""
    left = sampling.max_tokens - len(rollout.ids)
    return left if limit is None else min(left, limit - len(rollout.context))


def row_of(prompt: str, answer: str | None, columns: str) -> dict[str, Any]:
    """What an environment is told of a row: the row's other columns, and its prompt and answer."""
    return {**(json.loads(columns) if columns else {}), "prompt": prompt, "answer": answer}


def passes(trajectories: Sequence[Trajectory]) -> tuple[list[Sequence[int]], list[int]]:
    """What a sampler read before each turn, and how many tokens it sampled then: one entry a turn."""
    read: list[Sequence[int]] = []
    sampled: list[int] = []
    for trajectory in trajectories:
        context, at = trajectory.prompt.token_ids, 0
        for observation in trajectory.observations:
            read.append(context)
            sampled.append(observation.after - at)
            context = (*context, *trajectory.response_ids[at : observation.after], *observation.token_ids)
            at = observation.after
        if trajectory.response_ids:
            read.append(context)
            sampled.append(len(trajectory.response_ids) - at)
    return read, sampled


def _place(prompt: Prompt) -> str:
    return prompt.source or f"example {prompt.index + 1}"


def _short(text: str) -> str:
    return one_line(repr(text), 60)

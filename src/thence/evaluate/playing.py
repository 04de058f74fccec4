"""Evaluation of rollouts of several turns: a backend samples the turns, the task's environment answers and scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from thence.data.response import response_text
from thence.data.trajectory import Prompt, Trajectory
from thence.evaluate.backends import Generation, GivenScore, Prompts, Ready, Refused, Request
from thence.evaluate.versions import grader_version
from thence.rollout.native import Response, Sampling
from thence.rollout.turns import Player

if TYPE_CHECKING:
    from thence.evaluate.suites import Task

Sampler = Callable[[Sequence[Sequence[int]], Sequence[int], Sampling, Sequence[int]], Sequence[Response]]
"""Samples one response for each row of token ids, with a seed and a largest length each."""


def played(
    requests: Sequence[Request], task: Task, prompts: Prompts, sampler: Sampler, context: int | None, rows: int
) -> Iterator[tuple[Request, Generation | Refused]]:
    """The rollouts that are asked for, each with the score that the environment gave it.

    A rollout follows from its problem and its seed alone, not from those that are played beside it.

    Args:
        task: one with an environment.
        prompts: of the backend.
        sampler: of the backend.
        context: most tokens that the model can read; None: any number.
        rows: rollouts that are played side by side.

    Raises:
        UserError: the environment cannot be loaded or fails, or the chat template cannot write its observations.
        DataError: a prompt that does not end as the chat template opens a turn.
    """
    assert task.environment is not None
    ready, refused = prompts.prepare(requests, task, context)
    for plain in (False, True):
        group = [one for one in ready if one.request.problem.plain == plain]
        if not group:
            continue
        sampling = Sampling(task.max_tokens, task.temperature, task.top_p, stop_ids=group[0].stop_ids, rows=rows)

        def ask(
            contexts: Sequence[Sequence[int]], seeds: Sequence[int], limits: Sequence[int], how: Sampling = sampling
        ) -> Sequence[Response]:
            return sampler(contexts, seeds, how, limits)

        chat, version = prompts.plain if plain else prompts.chat, grader_version(task.environment.path)
        with closing(Player(task.environment, task.right_from, chat)) as player:
            for start in range(0, len(group), rows):
                wave = group[start : start + rows]
                asked, seeds = [_prompt(one) for one in wave], [one.request.seed for one in wave]
                found = player.play(prompts.tokenizer, asked, seeds, sampling, ask, context)
                for one, trajectory in zip(wave, found, strict=True):
                    generation = scored(prompts.tokenizer, trajectory, sampling.stop_ids, version)
                    yield one.request, replace(generation, room=one.cut)
    yield from refused


def _prompt(ready: Ready) -> Prompt:
    """A problem as rollouts know it."""
    problem = ready.request.problem
    return Prompt(
        *(0, tuple(ready.token_ids)),
        answer=problem.answer,
        text=problem.text,
        opening=ready.opening,
        columns=problem.columns or "",
        source=problem.source or f"problem {problem.key}",
    )


def said(tokenizer: Any, trajectory: Trajectory, stop_ids: Sequence[int]) -> Generation:
    """What a model said, as text, with its turns where there were several."""
    ids, opening = trajectory.after_prompt()[0], trajectory.prompt.opening
    text = response_text(tokenizer, ids, stop_ids, opening)
    return Generation(text, len(trajectory.response_ids), trajectory.finish, turns=trajectory.transcript)


def scored(tokenizer: Any, trajectory: Trajectory, stop_ids: Sequence[int], version: str) -> Generation:
    """What a model said in a rollout that an environment of this version scored."""
    verdict: Any = trajectory.verdict
    given = GivenScore(verdict, trajectory.score or 0.0, trajectory.reason, version)
    return replace(said(tokenizer, trajectory, stop_ids), score=given)

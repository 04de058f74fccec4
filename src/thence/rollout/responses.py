"""Sampling and grading responses, for RL and for evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from thence.data.order import stable_seed
from thence.data.response import response_text
from thence.data.trajectory import Prompt, Trajectory
from thence.rollout.native import Response, Sampling, sample
from thence.verify.grader import Grader


class Engine(Protocol):
    """Samples responses in another process; arguments as for :func:`thence.rollout.native.sample`."""

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling) -> list[Response]:
        """One response for every prompt."""
        ...


def respond(
    model: Any,
    tokenizer: Any,
    grader: Grader | None,
    prompts: Sequence[Prompt],
    n: int,
    sampling: Sampling,
    seed_parts: tuple[object, ...],
    engine: Engine | None = None,
    again: Sequence[int] | None = None,
    first: int = 0,
) -> list[Trajectory]:
    """``n`` responses for each prompt, prompt by prompt, graded if there is a grader.

    Args:
        seed_parts: what the random numbers follow from, besides the prompt's index and the number of the response.
        engine: samples in place of the model's own process, and holds the same weights.
        again: how often each prompt was drawn before, one number a prompt; default: how often it stands before in
            ``prompts``. A prompt drawn twice is sampled anew.
        first: number of each prompt's first response, where others of the same batch came before.
    """
    repeated = [prompt for prompt in prompts for _ in range(n)]
    seeds = []
    for prompt, times in zip(prompts, times_before(prompts) if again is None else again, strict=True):
        parts = (*seed_parts, times) if times else seed_parts
        seeds += [response_seed(parts, prompt, j) for j in range(first, first + n)]
    token_ids = [prompt.token_ids for prompt in repeated]
    responses = engine.sample(token_ids, seeds, sampling) if engine else sample(model, token_ids, seeds, sampling)
    found = [
        Trajectory(prompt, tuple(r.token_ids), finish=r.finish, sampler_logps=tuple(r.logps))
        for prompt, r in zip(repeated, responses, strict=True)
    ]
    return found if grader is None else grade(tokenizer, grader, found, sampling.stop_ids)


def response_seed(seed_parts: tuple[object, ...], prompt: Prompt, number: int) -> int:
    """The seed of a prompt's response of this number, from 0."""
    return stable_seed(*seed_parts, prompt.index, number)


def times_before(prompts: Sequence[Prompt]) -> list[int]:
    """How often each prompt stands before, by its index."""
    times: Counter[int] = Counter()
    result = []
    for prompt in prompts:
        result.append(times[prompt.index])
        times[prompt.index] += 1
    return result


def grade(
    tokenizer: Any, grader: Grader, trajectories: Sequence[Trajectory], stop_ids: Sequence[int]
) -> list[Trajectory]:
    """The same trajectories with text, score and verdict.

    Args:
        stop_ids: all tokens that end a response; the one at its end is no part of the text.
    """
    texts = [response_text(tokenizer, t.response_ids, stop_ids, t.prompt.opening) for t in trajectories]
    asked = [trajectory.prompt for trajectory in trajectories]
    columns = [prompt.columns for prompt in asked]
    grades = grader.grade_many([p.text for p in asked], texts, [p.answer for p in asked], columns)
    return [
        replace(
            trajectory,
            score=grade.score,
            verdict=grade.verdict.value,
            text=text,
            extracted=grade.extracted,
            reason=grade.reason,
            components=grade.components,
        )
        for trajectory, text, grade in zip(trajectories, texts, grades, strict=True)
    ]

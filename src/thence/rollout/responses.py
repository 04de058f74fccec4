"""Sampling and grading responses, for RL and for evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from thence.data.order import stable_seed
from thence.data.response import response_text
from thence.data.trajectory import Prompt, Trajectory
from thence.models.lengths import context_of
from thence.rollout.native import Response, Sampling, sample
from thence.rollout.turns import Player
from thence.verify.grader import Grader


class Engine(Protocol):
    """Samples responses in another process; arguments as for :func:`thence.rollout.native.sample`."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        limits: Sequence[int] | None = None,
    ) -> list[Response]:
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

    Where the grader is a :class:`~thence.rollout.turns.Player` they are rollouts of several turns, which it scores.

    Args:
        seed_parts: what the random numbers follow from, besides the prompt's index and the number of the response.
        engine: samples in place of the model's own process, and holds the same weights.
        again: how often each prompt was drawn before, one number a prompt; default: how often it stands before in
            ``prompts``. A prompt drawn twice is sampled anew.
        first: number of each prompt's first response, where others of the same batch came before.
    """
    repeated = [prompt for prompt in prompts for _ in range(n)]
    drawn = times_before(prompts) if again is None else again
    seeds = [
        seed for p, times in zip(prompts, drawn, strict=True) for seed in group_seeds(seed_parts, p, n, times, first)
    ]
    if isinstance(grader, Player):

        def ask(contexts: Sequence[Sequence[int]], own: Sequence[int], limits: Sequence[int]) -> list[Response]:
            if engine is not None:
                return engine.sample(contexts, own, sampling, limits)
            return sample(model, contexts, own, sampling, limits)

        return grader.play(tokenizer, repeated, seeds, sampling, ask, longest_row(model, engine))
    token_ids = [prompt.token_ids for prompt in repeated]
    responses = engine.sample(token_ids, seeds, sampling) if engine else sample(model, token_ids, seeds, sampling)
    found = [
        Trajectory(prompt, tuple(r.token_ids), finish=r.finish, sampler_logps=tuple(r.logps))
        for prompt, r in zip(repeated, responses, strict=True)
    ]
    return found if grader is None else grade(tokenizer, grader, found, sampling.stop_ids)


def longest_row(model: Any, engine: Engine | None) -> int | None:
    """Most tokens of a prompt and what follows it; None: any number."""
    known = [context_of(model.config), getattr(engine, "max_model_len", None)]
    return min((limit for limit in known if limit is not None), default=None)


def group_seeds(seed_parts: tuple[object, ...], prompt: Prompt, n: int, times: int = 0, first: int = 0) -> list[int]:
    """The seeds of ``n`` responses, from number ``first`` on, to a prompt that was drawn so many ``times`` before."""
    parts = (*seed_parts, times) if times else seed_parts
    return [response_seed(parts, prompt, j) for j in range(first, first + n)]


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

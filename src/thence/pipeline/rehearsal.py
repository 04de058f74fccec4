"""A rollout batch with made-up responses: a method that cannot work with a recipe says so before the first step.

Nothing is sampled and no model is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from thence.data.order import stable_seed
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import DataError
from thence.methods.base import Method, TokenFacts, make_batch
from thence.recipe import Rl

PROMPTS = 8


def rehearse(method: Method, stage: Rl, prompts: Sequence[Prompt]) -> None:
    """Let a fresh method compose and weigh a batch of one-token responses. Raises UserError where it refuses."""
    logger = logging.getLogger("thence.methods")
    before = logger.level
    logger.setLevel(logging.ERROR)  # what it says of made-up responses is of no use
    try:
        found = method.compose(Rehearsal(stage, prompts), min(stage.prompts, PROMPTS), stage.rollouts)
        sizes = [len(t.response_ids) for t in found]
        facts = []
        if method.uses_facts or method.uses_old or method.teacher is not None:
            shown = [solution is not None for solution in method.solutions(found)]
            facts = [
                TokenFacts(z, z, z if method.uses_old else None, z if taught else None)
                for z, taught in zip(map(torch.zeros, sizes), shown, strict=True)
            ]
        make_batch(method, found, facts)
    finally:
        logger.setLevel(before)


class Rehearsal:
    """Stands in for the sampler: every second response is right."""

    rank, world, step = 0, 1, 0

    def __init__(self, stage: Rl, prompts: Sequence[Prompt]):
        self.steps, self.prompts, self.drawn = stage.steps, prompts, 0

    def next_prompts(self, count: int) -> list[Prompt]:
        self.drawn += count
        return [self.prompts[i % len(self.prompts)] for i in range(self.drawn - count, self.drawn)]

    def expert_prompts(self, count: int) -> list[Prompt]:
        experts = [prompt for prompt in self.prompts if prompt.demonstration_ids]
        if not experts:
            raise no_demonstrations()
        return [experts[i % len(experts)] for i in range(count)]

    def rollouts(self, prompts: Sequence[Prompt], n: int) -> list[Trajectory]:
        return [_made(prompt, (), j) for prompt in prompts for j in range(n)]

    def continuations(self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]], n: int) -> list[Trajectory]:
        return [_made(p, tuple(begin), j) for p, begin in zip(prompts, prefixes, strict=True) for j in range(n)]

    def demonstrations(self, prompts: Sequence[Prompt]) -> list[Trajectory]:
        return [Trajectory(p, p.demonstration_ids or (), "demonstration", 1.0, "right") for p in prompts]

    def uniform(self, *key: object) -> float:
        return stable_seed(*key) / 2**63

    def total(self, count: int) -> int:
        return count

    def gather(self, value: Any) -> list[Any]:
        return [value]


def no_demonstrations() -> DataError:
    """What a method that trains on demonstrations says of data without any."""
    return DataError(
        "no example has a demonstration, and the method learns from them",
        remedy="give data with demonstrations, or another method",
        field="data.source",
    )


def _made(prompt: Prompt, begin: tuple[int, ...], j: int) -> Trajectory:
    ids = (*begin, prompt.token_ids[-1])
    logps = None if begin else (-1.0,)
    verdict = "wrong" if j % 2 else "right"
    return Trajectory(prompt, ids, score=1.0 - j % 2, verdict=verdict, sampler_logps=logps, prefix=len(begin))

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
    """Let a fresh method compose and weigh a batch of one-token responses. Raises UserError where it refuses.

    A method that falls back on demonstrations does so where rewards are low, so it gets a second batch without any
    right response.
    """
    logger = logging.getLogger("thence.methods")
    before = logger.level
    logger.setLevel(logging.ERROR)  # what it says of made-up responses is of no use
    try:
        for hopeless in (False, True) if method.demonstrations in ("whole", "begun") else (False,):
            found = method.compose(Rehearsal(stage, prompts, hopeless), min(stage.prompts, PROMPTS), stage.rollouts)
            make_batch(method, found, _facts(method, found))
    finally:
        logger.setLevel(before)


def _facts(method: Method, found: Sequence[Trajectory]) -> list[TokenFacts]:
    """Made-up facts of every trajectory, as far as the method asks for them."""
    if not (method.uses_facts or method.uses_old or method.uses_reference or method.teacher is not None):
        return []
    facts, theirs = [], method.uses_reference
    for trajectory, solution in zip(found, method.solutions(found), strict=True):
        zeros = torch.zeros(len(trajectory.response_ids))
        old, reference = zeros if method.uses_old else None, zeros if theirs else None
        taught = None if solution is None else zeros
        facts.append(TokenFacts(zeros, zeros, old, reference, 2 * theirs, taught, taught is not None))
    return facts


class Rehearsal:
    """Stands in for the sampler: every second response is right, or none is. No token holds a blank line."""

    rank, world, step = 0, 1, 0

    def __init__(self, stage: Rl, prompts: Sequence[Prompt], hopeless: bool = False):
        self.steps, self.prompts, self.drawn, self.hopeless = stage.steps, prompts, 0, hopeless

    def next_prompts(self, count: int) -> list[Prompt]:
        self.drawn += count
        return [self.prompts[i % len(self.prompts)] for i in range(self.drawn - count, self.drawn)]

    def expert_prompts(self, count: int) -> list[Prompt]:
        experts = [prompt for prompt in self.prompts if prompt.demonstration_ids]
        if not experts:
            raise no_demonstrations()
        return [experts[i % len(experts)] for i in range(count)]

    def rollouts(self, prompts: Sequence[Prompt], n: int, first: int = 0) -> list[Trajectory]:
        return [self._made(prompt, (), j) for prompt in prompts for j in range(first, first + n)]

    def continuations(
        self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]], n: int, first: int = 0
    ) -> list[Trajectory]:
        pairs = zip(prompts, prefixes, strict=True)
        return [self._made(p, tuple(begin), j) for p, begin in pairs for j in range(first, first + n)]

    def demonstrations(self, prompts: Sequence[Prompt]) -> list[Trajectory]:
        return [Trajectory(p, p.demonstration_ids or (), "demonstration", 1.0, "right") for p in prompts]

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return [""] * len(token_ids)

    def uniform(self, *key: object) -> float:
        return stable_seed(*key) / 2**63

    def total(self, count: int) -> int:
        return count

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def _made(self, prompt: Prompt, begin: tuple[int, ...], j: int) -> Trajectory:
        ids, right = (*begin, prompt.token_ids[-1]), not (self.hopeless or j % 2)
        logps, verdict = None if begin else (-1.0,), "right" if right else "wrong"
        return Trajectory(prompt, ids, "rollout", float(right), verdict, sampler_logps=logps, prefix=len(begin))


def no_demonstrations() -> DataError:
    """What a method that trains on demonstrations says of data without any."""
    return DataError(
        "no example has a demonstration, and the method learns from them",
        remedy="give data with demonstrations, or another method",
        field="data.source",
    )

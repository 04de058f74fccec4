"""A sampler whose responses have the rewards that a test gives them, for TRAPO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from thence.data.trajectory import Prompt, Trajectory

DEMONSTRATION = (*range(10, 110), 1)
"""101 tokens with the end token; token 10 + i stands at index i."""


class Rewarded:
    """Prompts 0, 1, ...; response ``number`` to a prompt has the reward that is listed there, and two own tokens.

    Args:
        rewards: of each prompt's responses by their number, the demonstration's included.
        breaks: indices in the demonstration of tokens with a blank line.
        bare: prompts without a demonstration.
    """

    rank, world, step, steps = 0, 1, 0, 10

    def __init__(self, *rewards: Sequence[float | None], breaks: Sequence[int] = (), bare: Sequence[int] = ()):
        self.rewards = rewards
        self.lines = {DEMONSTRATION[i] for i in breaks}
        self.prompts = [Prompt(i, (2, 3), None if i in bare else DEMONSTRATION, draw=i) for i in range(len(rewards))]
        self.asked: list[tuple[str, list[int], int, int]] = []

    def next_prompts(self, count: int) -> list[Prompt]:
        return self.prompts[:count]

    def expert_prompts(self, count: int) -> list[Prompt]:
        raise NotImplementedError

    def made(self, prompt: Prompt, begin: Sequence[int], number: int) -> Trajectory:
        ids = (*begin, 200 + number, 1)
        return Trajectory(prompt, ids, score=self.rewards[prompt.index][number], prefix=len(begin))

    def rollouts(self, prompts: Sequence[Prompt], n: int, first: int = 0) -> list[Trajectory]:
        self.asked.append(("rollouts", [p.index for p in prompts], n, first))
        return [self.made(prompt, (), j) for prompt in prompts for j in range(first, first + n)]

    def continuations(
        self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]], n: int, first: int = 0
    ) -> list[Trajectory]:
        self.asked.append(("continuations", [p.index for p in prompts], n, first))
        pairs = zip(prompts, prefixes, strict=True)
        return [self.made(prompt, begin, j) for prompt, begin in pairs for j in range(first, first + n)]

    def demonstrations(self, prompts: Sequence[Prompt]) -> list[Trajectory]:
        self.asked.append(("demonstrations", [p.index for p in prompts], 1, 0))
        return [Trajectory(p, p.demonstration_ids or (), "demonstration", self.rewards[p.index][-1]) for p in prompts]

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return ["so.\n\n" if token in self.lines else "\n" for token in token_ids]

    def uniform(self, *key: object) -> float:
        raise NotImplementedError

    def total(self, count: int) -> int:
        return count

    def gather(self, value: Any) -> list[Any]:
        return [value]


def levels(group: Sequence[Trajectory]) -> list[int]:
    """The micro-group, from 0, of each guided response of a group; 0 of the others."""
    return [t.round if t.prefix or t.origin == "demonstration" else 0 for t in group]

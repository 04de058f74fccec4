"""A sampler that gives made scores, for methods that choose between rewards and demonstrations."""

from __future__ import annotations

import random

from thence.data.trajectory import Prompt, Trajectory
from thence.methods.hpt import Hpt
from thence.methods.relift import Relift
from thence.methods.sasr import Sasr
from thence.methods.superrl import SuperRl

OWN = (Relift, Hpt, SuperRl, Sasr)


class FakeSampler:
    """Prompts 0, 1, 2, ... with demonstrations; the scores of a prompt's group are looked up, 0 where there are none.

    Responses are random tokens of random lengths. ``luck`` is what every coin shows.
    """

    def __init__(self, scores: dict[int, list[float]], bare: tuple[int, ...] = (), luck: float = 0.5):
        self.scores, self.bare, self.luck = scores, bare, luck
        self.step, self.steps, self.drawn, self.expert_drawn = 0, 100, 0, 0
        self.rank, self.world = 0, 1

    def prompt(self, index: int) -> Prompt:
        rng = random.Random(index)
        ids = [rng.randrange(40) for _ in range(rng.randint(2, 4))]
        shown = tuple(rng.randrange(40) for _ in range(rng.randint(3, 12)))
        return Prompt(index, tuple(ids), None if index in self.bare else shown)

    def next_prompts(self, count):
        self.drawn += count
        return [self.prompt(self.drawn - count + i) for i in range(count)]

    def expert_prompts(self, count):
        self.expert_drawn += count
        return [self.prompt(self.expert_drawn - count + i) for i in range(count)]

    def rollouts(self, prompts, n: int):
        rng = random.Random(7)
        return [
            Trajectory(p, tuple(rng.randrange(40) for _ in range(rng.randint(1, 10))), score=score)
            for p in prompts
            for score in self.scores.get(p.index, [0.0] * n)
        ]

    def continuations(self, prompts, prefixes, n):
        raise NotImplementedError

    def demonstrations(self, prompts):
        return [Trajectory(p, p.demonstration_ids or (), origin="demonstration", score=1.0) for p in prompts]

    def uniform(self, *key):
        return self.luck

    def total(self, count):
        return count

    def gather(self, value):
        return [value]


def kinds(trajectories: list[Trajectory]) -> list[tuple[int, str]]:
    return [(t.prompt.index, t.origin) for t in trajectories]


def right(k: int, n: int = 8) -> list[float]:
    return [1.0] * k + [0.0] * (n - k)

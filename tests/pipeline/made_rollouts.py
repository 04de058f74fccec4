"""Rollout batches of made-up responses, dealt to ranks as the real sampler deals prompts: no model is asked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal

from tests.tiny_model import VOCAB
from thence.data.order import stable_seed
from thence.data.trajectory import Prompt, Trajectory
from thence.train.parallel import Ranks

Kind = Literal["ragged", "idle ranks"]
"""Of a batch. ragged: responses of very different lengths. idle ranks: every second draw, so all that odd ranks hold,
trains nothing: of draws 1, 5, ... nobody can tell the reward, responses to draws 3, 7, ... have no token."""
EXAMPLES = 11


class MadeRollouts:
    """What a method composes its batch with. Responses follow from the draw alone, whatever the number of ranks."""

    def __init__(self, ranks: Ranks, steps: int):
        self.ranks, self.rank, self.world = ranks, ranks.rank, ranks.world
        self.step, self.steps = 0, steps
        self.kind: Kind = "ragged"
        self.drawn = self.expert_drawn = self.draws = 0

    def begin(self, step: int, kind: Kind) -> None:
        """A new rollout batch."""
        self.step, self.kind, self.draws = step, kind, 0

    def next_prompts(self, count: int) -> list[Prompt]:
        self.drawn += count
        return self._dealt(self.drawn - count, count)

    def expert_prompts(self, count: int) -> list[Prompt]:
        self.expert_drawn += count
        return self._dealt(self.expert_drawn - count, count)

    def rollouts(self, prompts: Sequence[Prompt], n: int, first: int = 0) -> list[Trajectory]:
        return [self._made(prompt, (), number) for prompt in prompts for number in range(first, first + n)]

    def continuations(
        self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]], n: int, first: int = 0
    ) -> list[Trajectory]:
        pairs, numbers = zip(prompts, prefixes, strict=True), range(first, first + n)
        return [self._made(prompt, tuple(prefix), 100 + j) for prompt, prefix in pairs for j in numbers]

    def demonstrations(self, prompts: Sequence[Prompt]) -> list[Trajectory]:
        return [Trajectory(p, p.demonstration_ids or (), "demonstration", 1.0, "right") for p in prompts]

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return ["\n\n" if token % 5 == 0 else "" for token in token_ids]

    def uniform(self, *key: object) -> float:
        return stable_seed(self.step, *key) / 2**63

    def total(self, count: int) -> int:
        return self.ranks.sum_counts([count])[0]

    def gather(self, value: Any) -> list[Any]:
        return self.ranks.gather(value)

    def _dealt(self, start: int, count: int) -> list[Prompt]:
        placed = [made_prompt((start + i) % EXAMPLES, self.draws + i, self.kind) for i in range(count)]
        self.draws += count
        return placed[self.rank :: self.world]

    def _made(self, prompt: Prompt, prefix: tuple[int, ...], number: int) -> Trajectory:
        """Two of five responses are right; of every third example none is."""
        idle = prompt.draw % 4 if self.kind == "idle ranks" else 0
        rng = random.Random(stable_seed(self.step, *prompt.group_key, number))
        tokens = 0 if idle == 3 else rng.choice((1, 2, 3, 5, 9, 17))
        ids = (*prefix, *(rng.randrange(VOCAB) for _ in range(tokens)))
        right = prompt.index % 3 != 2 and (prompt.index + number) % 5 < 2
        known = idle != 1
        return Trajectory(
            prompt,
            ids,
            score=float(right) if known else None,
            verdict=("right" if right else "wrong") if known else "unknown",
            sampler_logps=None if prefix else tuple(-rng.uniform(0.5, 5.0) for _ in ids),
            prefix=len(prefix),
        )


def made_prompt(index: int, draw: int, kind: Kind = "ragged") -> Prompt:
    """An example; one that an idle rank holds has no demonstration."""
    rng = random.Random(index)
    ids = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(2, 6)))
    shown = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(3, 14)))
    return Prompt(index, ids, None if draw % 2 and kind != "ragged" else shown, draw=draw)

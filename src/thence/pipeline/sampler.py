"""What a method composes its batch with: prompts in order, graded responses, demonstrations."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from thence.data.order import drawn_from, stable_seed
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import DataError
from thence.evaluate.measure import Engine, grade, respond
from thence.pipeline.context import Context
from thence.recipe import Rl
from thence.rollout.native import Sampling
from thence.verify.reward import Grader


class Renewed(Engine, Protocol):
    """An engine in another process, which is given the trainer's weights before it samples."""

    def push_weights(self, model: Any, version: int) -> None:
        """Give it these weights, under a version that every response is stamped with."""
        ...


class RolloutSampler:
    """Gives a method prompts in the data's order, and graded responses of the policy.

    Each rank draws from its own share of the prompts. ``drawn`` and ``expert_drawn`` are the positions in it; ``seen``
    holds every response that was sampled in this step, trained or not.
    """

    def __init__(
        self, context: Context, stage: Rl, prompts: Sequence[Prompt], grader: Grader, engine: Renewed | None = None
    ):
        self.context, self.grader, self.engine = context, grader, engine
        self.prompts = prompts[context.ranks.rank :: context.ranks.world]
        self.experts = [prompt for prompt in self.prompts if prompt.demonstration_ids]
        self.drawn = self.expert_drawn = 0
        self.step, self.steps = 0, stage.steps
        self.seconds = 0.0
        self.seen: list[Trajectory] = []
        self.unknown = stage.unknown
        self.sampling = Sampling(
            max_tokens=stage.max_tokens,
            temperature=stage.temperature,
            top_p=stage.top_p,
            top_k=stage.top_k,
            stop_ids=context.stop_ids(context.recipe.stage_data(stage.data)),
            rows=stage.rollout_rows,
        )

    def begin(self, step: int) -> None:
        """A new rollout batch, counted from 0. Another engine gets the weights as they stand."""
        self.step, self.seconds, self.seen = step, 0.0, []
        if self.engine is not None:
            start = time.perf_counter()
            self.engine.push_weights(self.context.model, step)
            self.seconds += time.perf_counter() - start

    def next_prompts(self, count: int) -> list[Prompt]:
        chosen = drawn_from(len(self.prompts), self.drawn, count, self.context.recipe.seed)
        self.drawn += count
        return [self.prompts[i] for i in chosen]

    def expert_prompts(self, count: int) -> list[Prompt]:
        if not self.experts:
            raise DataError(
                "no example has a demonstration, and the method trains on them",
                remedy="give data with demonstrations, or another method",
                field="data.source",
            )
        chosen = drawn_from(
            len(self.experts), self.expert_drawn, count, stable_seed(self.context.recipe.seed, "expert")
        )
        self.expert_drawn += count
        return [self.experts[i] for i in chosen]

    def rollouts(self, prompts: Sequence[Prompt], n: int) -> list[Trajectory]:
        return self._sampled(prompts, n, (*self.context.seed_parts(), "rollout", self.drawn))

    def continuations(self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]], n: int) -> list[Trajectory]:
        longer = [
            replace(prompt, token_ids=(*prompt.token_ids, *prefix))
            for prompt, prefix in zip(prompts, prefixes, strict=True)
        ]
        found = self._sampled(longer, n, (*self.context.seed_parts(), "continuation", self.drawn), keep=False)
        original = [(prompt, tuple(prefix)) for prompt, prefix in zip(prompts, prefixes, strict=True) for _ in range(n)]
        whole = []
        for trajectory, (prompt, prefix) in zip(found, original, strict=True):
            ids = (*prefix, *trajectory.response_ids)[: self.sampling.max_tokens]
            cut = len(ids) < len(prefix) + len(trajectory.response_ids)
            finish = "length" if cut else trajectory.finish
            whole.append(Trajectory(prompt, ids, finish=finish, prefix=min(len(prefix), len(ids))))
        graded = self._known(grade(self.context.tokenizer, self.grader, whole, self.sampling.stop_ids))
        self.seen += graded
        return graded

    def demonstrations(self, prompts: Sequence[Prompt]) -> list[Trajectory]:
        found = [Trajectory(p, p.demonstration_ids or (), origin="demonstration") for p in prompts]
        return self._known(grade(self.context.tokenizer, self.grader, found, self.sampling.stop_ids))

    def _known(self, graded: Sequence[Trajectory]) -> list[Trajectory]:
        """The same without a score where nobody can tell it, unless the recipe asks for zero."""
        if self.unknown == "zero":
            return list(graded)
        return [t.scored(None) if t.verdict == "unknown" else t for t in graded]

    def uniform(self, *key: object) -> float:
        return stable_seed(*self.context.seed_parts(), "method", self.step, *key) / 2**63

    def total(self, count: int) -> int:
        return self.context.ranks.sum_counts([count])[0]

    def _sampled(
        self, prompts: Sequence[Prompt], n: int, seed_parts: tuple[object, ...], keep: bool = True
    ) -> list[Trajectory]:
        start = time.perf_counter()
        grader = self.grader if keep else None
        found = respond(
            self.context.model, self.context.tokenizer, grader, prompts, n, self.sampling, seed_parts, self.engine
        )
        found = self._known(found) if keep else found
        self.seconds += time.perf_counter() - start
        repeated = [prompt.token_ids for prompt in prompts for _ in range(n)]
        self.context.meter.sampled(repeated, [len(trajectory.response_ids) for trajectory in found])
        if keep:
            self.seen += found
        return found

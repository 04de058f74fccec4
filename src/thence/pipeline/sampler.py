"""What a method composes its batch with: prompts in order, graded responses, demonstrations."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from thence.data.order import drawn_from, stable_seed
from thence.data.response import response_text
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import UserError
from thence.models.lengths import context_of
from thence.pipeline.context import StageContext
from thence.pipeline.rehearsal import no_demonstrations
from thence.pipeline.room import response_tokens
from thence.recipe import Rl
from thence.rollout.native import Sampling
from thence.rollout.responses import Engine, grade, respond
from thence.rollout.turns import Player, passes
from thence.verify.reward import Grader


class SyncedEngine(Engine, Protocol):
    """An engine in another process, which is given the policy's weights before it samples."""

    def update(self, version: int) -> None:
        """Give it the weights as they stand, with a version that responses are stamped with; all ranks together."""
        ...


class RolloutSampler:
    """Gives a method prompts in the data's order, and graded responses of the policy.

    There is one position in the data, ``drawn``, and one among the prompts with a demonstration, ``expert_drawn``. All
    ranks draw the same prompts, and each takes its share of them in turn; the random numbers of a response follow from
    the position alone. So 1, 2 or 4 ranks sample the same responses. ``seen`` holds every response that this rank
    sampled in this step, trained or not.
    """

    def __init__(
        self,
        context: StageContext,
        stage: Rl,
        prompts: Sequence[Prompt],
        grader: Grader,
        engine: SyncedEngine | None = None,
    ):
        self.context, self.grader, self.engine = context, grader, engine
        self.prompts, self.seed = prompts, context.order_seed(stage.data)
        self.experts = [prompt for prompt in self.prompts if prompt.demonstration_ids]
        self.rank, self.world = context.ranks.rank, context.ranks.world
        self.drawn = self.expert_drawn = 0
        self.draws = 0  # of this rollout batch
        self.times: Counter[int] = Counter()
        self.again: dict[tuple[int, int], int] = {}
        self.step, self.steps = 0, stage.steps
        self.model: Any = None  # while a rollout batch is composed
        self.seconds = 0.0
        self.seen: list[Trajectory] = []
        self.texts: dict[int, str] = {}  # of single tokens
        self.limit = context_of(context.model.config)
        self.unknown = stage.unknown
        self.sampling = Sampling(
            max_tokens=response_tokens(context.name, stage, prompts, self.limit),
            temperature=stage.temperature,
            top_p=stage.top_p,
            top_k=stage.top_k,
            stop_ids=context.stop_ids(context.recipe.stage_data(stage.data)),
            rows=stage.rollout_rows,
        )

    def begin(self, step: int, model: Any) -> None:
        """A new rollout batch, counted from 0, sampled from this whole model; an engine gets the policy's weights."""
        self.model = self.context.model if model is None else model  # an engine samples: its context counts alone
        self.step, self.seconds, self.seen = step, 0.0, []
        self.draws, self.times, self.again = 0, Counter(), {}
        if self.engine is not None:
            start = time.perf_counter()
            self.engine.update(step)
            self.seconds += time.perf_counter() - start

    def next_prompts(self, count: int) -> list[Prompt]:
        chosen = drawn_from(len(self.prompts), self.drawn, count, self.seed)
        self.drawn += count
        return self._dealt([self.prompts[i] for i in chosen])

    def expert_prompts(self, count: int) -> list[Prompt]:
        if not self.experts:
            raise no_demonstrations()
        seed = None if self.seed is None else stable_seed(self.seed, "expert")
        chosen = drawn_from(len(self.experts), self.expert_drawn, count, seed)
        self.expert_drawn += count
        return self._dealt([self.experts[i] for i in chosen])

    def rollouts(self, prompts: Sequence[Prompt], n: int, first: int = 0) -> list[Trajectory]:
        return self._sampled(prompts, n, (*self.context.seed_parts(), "rollout", self.drawn), first=first)

    def continuations(
        self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]], n: int, first: int = 0
    ) -> list[Trajectory]:
        if isinstance(self.grader, Player):
            raise UserError(
                "responses that an expert begins are of one turn, and an environment plays rollouts of several",
                remedy="take a method that samples whole rollouts, such as grpo, or leave the environment out",
                field=f"{self.context.name}.environment",
            )
        longer = [
            replace(prompt, token_ids=(*prompt.token_ids, *prefix))
            for prompt, prefix in zip(prompts, prefixes, strict=True)
        ]
        found = self._continued(longer, [len(prefix) for prefix in prefixes], n, first)
        original = [(prompt, tuple(prefix)) for prompt, prefix in zip(prompts, prefixes, strict=True) for _ in range(n)]
        whole = []
        for trajectory, (prompt, prefix) in zip(found, original, strict=True):
            ids = (*prefix, *trajectory.response_ids)[: self.sampling.max_tokens]
            cut = len(ids) < len(prefix) + len(trajectory.response_ids)
            finish = "length" if cut else trajectory.finish
            whole.append(Trajectory(prompt, ids, finish=finish, prefix=min(len(prefix), len(ids))))
        return self.take_in(whole)

    def _continued(self, longer: Sequence[Prompt], given: Sequence[int], n: int, first: int) -> list[Trajectory]:
        """``n`` responses for each prompt that ends with so many given tokens of its response, within ``max_tokens``.

        What goes beyond it is cut off by the caller; here only what would not fit into the model's context is left out.
        """
        seed_parts, most = (*self.context.seed_parts(), "continuation", self.drawn), self.sampling.max_tokens
        rooms = [most - size for size in given]
        for i, prompt in enumerate(longer):  # never a matter of the other prompts: those that a rank holds are not all
            if self.limit is None or len(prompt.token_ids) + most <= self.limit:
                rooms[i] = most
        found: dict[int, list[Trajectory]] = {}
        for room in set(rooms):
            chosen = [i for i, r in enumerate(rooms) if r == room]
            made = [Trajectory(longer[i], (), finish="length") for i in chosen for _ in range(n)]
            if room > 0:
                sampling = replace(self.sampling, max_tokens=room)
                asked = [longer[i] for i in chosen]
                made = self._sampled(asked, n, seed_parts, keep=False, sampling=sampling, first=first)
            found |= {i: made[k * n : k * n + n] for k, i in enumerate(chosen)}
        return [trajectory for i in range(len(longer)) for trajectory in found[i]]

    def demonstrations(self, prompts: Sequence[Prompt]) -> list[Trajectory]:
        plain = [prompt.without_observation for prompt in prompts]
        found = [Trajectory(p, p.demonstration_ids or (), origin="demonstration") for p in plain]
        return self._known(grade(self.context.tokenizer, self.grader, found, self.sampling.stop_ids))

    def take_in(self, found: Sequence[Trajectory]) -> list[Trajectory]:
        """Whole responses that were sampled elsewhere, graded like its own, and seen in this step like them."""
        graded = self._known(grade(self.context.tokenizer, self.grader, found, self.sampling.stop_ids))
        self.seen += graded
        return graded

    def _known(self, graded: Sequence[Trajectory]) -> list[Trajectory]:
        """The same without a score where nobody can tell it, unless the recipe asks for zero."""
        if self.unknown == "zero":
            return list(graded)
        return [t.scored(None) if t.verdict == "unknown" else t for t in graded]

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        for token in token_ids:
            if token not in self.texts:
                self.texts[token] = response_text(self.context.tokenizer, [token], ())
        return [self.texts[token] for token in token_ids]

    def uniform(self, *key: object) -> float:
        return stable_seed(*self.context.seed_parts(), "method", self.step, *key) / 2**63

    def total(self, count: int) -> int:
        return self.context.ranks.sum_counts([count])[0]

    def gather(self, value: Any) -> list[Any]:
        return self.context.ranks.gather(value)

    def _dealt(self, chosen: Sequence[Prompt]) -> list[Prompt]:
        """This rank's share of prompts, each with its place in the batch of all ranks."""
        placed = [replace(prompt, draw=self.draws + i) for i, prompt in enumerate(chosen)]
        for prompt in placed:
            self.again[prompt.group_key] = self.times[prompt.index]
            self.times[prompt.index] += 1
        self.draws += len(placed)
        return placed[self.rank :: self.world]

    def _sampled(
        self,
        prompts: Sequence[Prompt],
        n: int,
        seed_parts: tuple[object, ...],
        keep: bool = True,
        sampling: Sampling | None = None,
        first: int = 0,
    ) -> list[Trajectory]:
        if not prompts:
            return []
        start = time.perf_counter()
        grader = self.grader if keep else None
        prompts = [prompt.without_observation for prompt in prompts]  # a method may take them from rollouts
        again = [self.again.get(prompt.group_key, 0) for prompt in prompts]
        tokenizer = self.context.tokenizer
        found = respond(
            self.model, tokenizer, grader, prompts, n, sampling or self.sampling, seed_parts, self.engine, again, first
        )
        found = self._known(found) if keep else found
        self.seconds += time.perf_counter() - start
        self.context.meter.sampled(*passes(found))
        if keep:
            self.seen += found
        return found

"""What a method says that a rollout batch costs is what it samples and trains, whatever comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from thence.data.trajectory import Prompt, Trajectory
from thence.methods.base import Method, Sampler
from thence.methods.grpo import Grpo
from thence.methods.luffy import Luffy
from thence.methods.registry import methods

LENGTH, PROMPTS, N, BATCHES = 40, 4, 8, 6
RL = sorted(name for name, kind in methods().items() if kind.stage == "rl")


class Counting:
    """Prompts with demonstrations; every response and demonstration is as long. Counts the tokens that are sampled."""

    rank, world, steps = 0, 1, BATCHES

    def __init__(self, right: float, luck: float):
        self.right, self.luck, self.step, self.drawn, self.sampled = right, luck, 0, 0, 0

    def next_prompts(self, count: int) -> list[Prompt]:
        self.drawn += count
        shown = tuple(range(LENGTH))
        return [Prompt(i, (1, 2), shown, draw=i) for i in range(self.drawn - count, self.drawn)]

    expert_prompts = next_prompts

    def rollouts(self, prompts: Sequence[Prompt], n: int, first: int = 0) -> list[Trajectory]:
        return self.continuations(prompts, [()] * len(prompts), n)

    def continuations(
        self, prompts: Sequence[Prompt], prefixes: Sequence[Sequence[int]], n: int, first: int = 0
    ) -> list[Trajectory]:
        made = []
        for prompt, prefix in zip(prompts, prefixes, strict=True):
            for i in range(n):
                self.sampled += LENGTH - len(prefix)
                score = float(i < self.right * n)
                ids = (*prefix, *range(LENGTH - len(prefix)))
                trajectory = Trajectory(prompt, ids, score=score, verdict="right" if score else "wrong")
                made.append(replace(trajectory, prefix=len(prefix), sampler_logps=(-1.0,) * LENGTH))
        return made

    def demonstrations(self, prompts: Sequence[Prompt]) -> list[Trajectory]:
        return [Trajectory(p, p.demonstration_ids or (), origin="demonstration", score=1.0) for p in prompts]

    def uniform(self, *key: Any) -> float:
        return self.luck

    def total(self, count: int) -> int:
        return count

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return ["x"] * len(token_ids)


def spent(method: Method, right: float, luck: float) -> tuple[float, float]:
    """Responses sampled and trained a batch, demonstrations among the trained ones, over several batches."""
    sampler, trained = Counting(right, luck), 0
    for sampler.step in range(BATCHES):
        rows = list(method.compose(sampler, PROMPTS, N))
        for side in method.side_steps(sampler):
            rows += side.trajectories
        trained += sum(len(row.response_ids) for row in rows)
    return sampler.sampled / LENGTH / BATCHES, trained / LENGTH / BATCHES


@pytest.mark.parametrize("name", RL)
@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("luck", [0.0, 0.5, 0.99])
def test_what_a_batch_costs_lies_between_the_bounds_that_the_method_states(name: str, right: float, luck: float):
    options = {"sft_batch": PROMPTS} if name == "relift" else {}
    method = methods()[name](options)
    method.prepare(N, LENGTH)
    work = method.work(PROMPTS, N)
    sampled, trained = spent(method, right, luck)
    bounds = [(o.sampled, o.trained + o.demonstrations) for o in (work.least, work.most)]
    a_token = 1.01 * PROMPTS * N / LENGTH  # prefixes are cut to whole tokens
    assert min(s for s, _ in bounds) - a_token <= sampled <= max(s for s, _ in bounds) + a_token
    least = 0 if name == "dapo" else min(t for _, t in bounds)  # after its last try dapo trains what it found
    assert least - a_token <= trained <= max(t for _, t in bounds) + a_token


@pytest.mark.parametrize(
    "options", [{"over_sampling": 1.5}, {"first_rollouts": 2}, {"over_sampling": 2.1, "first_rollouts": 6}]
)
@pytest.mark.parametrize(("right", "batches"), [(0.0, 0), (0.5, 1), (1.0, 0)])
def test_what_groups_that_are_given_up_or_too_many_cost_lies_within_the_bounds(
    options: dict[str, Any], right: float, batches: int
):
    method = methods()["dapo"](options)
    method.prepare(N, LENGTH)
    work = method.work(PROMPTS, N)
    sampled, trained = spent(method, right, 0.5)
    assert work.least.sampled <= sampled <= work.most.sampled
    assert trained == batches * PROMPTS * N


@pytest.mark.parametrize("name", RL)
def test_a_method_that_composes_its_own_batch_states_what_it_costs(name: str):
    assert methods()[name]({}).states_work


def test_a_method_that_composes_otherwise_and_says_nothing_is_not_counted_as_what_it_builds_on():
    class Twice(Grpo):
        def compose(self, sampler: Sampler, prompts: int, n: int) -> list[Trajectory]:
            return super().compose(sampler, prompts, 2 * n)

    class Heavier(Luffy):
        formula = "another"

    assert not Twice({}).states_work and Heavier({}).states_work

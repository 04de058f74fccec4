"""Groups of DAPO that are sampled beyond the batch, or given up after their first answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.recipes import Recipes
from tests.runs import metrics
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import RecipeError
from thence.methods.dapo import Dapo
from thence.pipeline.run import run


class Numbered:
    """Prompts 0, 1, 2, ... dealt to ranks in turn; response j of a prompt has the token j and the score looked up."""

    def __init__(self, scores: dict[int, list[float | None]], rank: int = 0, world: int = 1):
        self.scores, self.rank, self.world, self.drawn = scores, rank, world, 0
        self.asked: list[tuple[list[int], int, int]] = []

    def next_prompts(self, count: int) -> list[Prompt]:
        self.drawn += count
        chosen = [Prompt(i, (2, 3), draw=i) for i in range(self.drawn - count, self.drawn)]
        return chosen[self.rank :: self.world]

    def rollouts(self, prompts: Sequence[Prompt], n: int, first: int = 0) -> list[Trajectory]:
        self.asked.append(([prompt.index for prompt in prompts], n, first))
        return [
            Trajectory(prompt, (j,), score=self.scores.get(prompt.index, [0.0] * 16)[j])
            for prompt in prompts
            for j in range(first, first + n)
        ]

    def gather(self, value: Any) -> list[Any]:
        return [value]


def composed(sampler: Numbered, prompts: int, n: int, **options: Any) -> list[tuple[int, int]]:
    method = Dapo({"overlong_buffer": 0, **options})
    method.prepare(n, 8)
    made: Any = sampler
    return [(t.prompt.index, t.response_ids[0]) for t in method.compose(made, prompts, n)]


def test_a_round_samples_more_groups_than_the_batch_has_and_the_first_ones_that_teach_are_trained():
    sampler = Numbered({1: [0, 1], 2: [1, 0], 4: [0, 1]})
    assert composed(sampler, 2, 2, over_sampling=2.5) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert sampler.asked == [([0, 1, 2, 3, 4], 2, 0)]


def test_a_group_whose_first_answers_agree_is_given_up_and_the_others_are_finished_by_the_responses_that_come_next():
    scores: dict[int, list[float | None]] = {0: [1, 1, 0, 0], 1: [1, 0, 0, 1], 2: [None, 1, 1, 0], 3: [0, 0, 0, 1]}
    sampler = Numbered(scores)
    found = composed(sampler, 2, 4, over_sampling=2, first_rollouts=2)
    assert found == [(1, j) for j in range(4)] + [(2, j) for j in range(4)]
    # a first answer that nobody can judge decides nothing
    assert sampler.asked == [([0, 1, 2, 3], 2, 0), ([1, 2], 2, 2)]


def test_groups_that_are_not_given_up_are_those_of_whole_sampling():
    scores: dict[int, list[float | None]] = {i: [1, 0, i % 2, 1] for i in range(4)}
    whole, begun = (composed(Numbered(scores), 4, 4, first_rollouts=first) for first in (0, 2))
    assert whole == begun


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"first_rollouts": 1}, "cannot differ"),
        ({"first_rollouts": 4}, "leaves nothing of a group of 4"),
        ({"over_sampling": 0.5}, "over_sampling"),
        ({"dynamic_sampling": False, "over_sampling": 2}, "dynamic_sampling"),
        ({"dynamic_sampling": False, "first_rollouts": 2}, "dynamic_sampling"),
    ],
)
def test_settings_that_can_do_nothing_are_refused(options: dict[str, Any], words: str):
    with pytest.raises(RecipeError, match=words):
        composed(Numbered({}), 2, 4, **options)


def test_the_plan_knows_what_a_round_samples_at_once_and_what_the_least_is():
    work = Dapo({"over_sampling": 4, "overlong_buffer": 0}).work(16, 8)
    assert work.at_once == 64 and work.least.sampled == 64 * 8
    given_up = Dapo({"first_rollouts": 4, "max_generations": 3, "overlong_buffer": 0}).work(1, 16)
    assert given_up.least.sampled == 3 * 4  # three rounds of four first answers that agree
    assert Dapo({"overlong_buffer": 0}).work(16, 8).least.sampled == 16 * 8


def test_tokens_that_are_sampled_and_not_trained_are_counted(recipes: Recipes):
    """Two prompts of four are given up after two answers; the others are whole, and one of them is too many."""
    file = recipes.folder / "differs.py"
    file.write_text(
        "seen = {}\n"
        "def reward(prompt, response, answer):\n"
        "    number = seen.setdefault(prompt, [len(seen), 0])\n"
        "    number[1] += 1\n"
        "    return float(number[0] % 2 and number[1] % 2)\n"
    )
    options = {"over_sampling": 4, "first_rollouts": 2, "max_generations": 1, "overlong_buffer": 0}
    rl = {"method": "dapo", "options": options, "steps": 1, "prompts": 1, "rollouts": 4, "reward": f"{file}:reward"}
    lines = metrics(run(recipes(["rl"], rl=rl)))
    line = lines[0]
    assert line["sequences"] == 4
    assert line["unused_tokens"] == line["sampled_tokens"] - line["trained_tokens"] > 0
    kept = metrics(run(recipes(["rl"], folder=str(recipes.folder / "grpo"), rl=rl | {"method": "grpo", "options": {}})))
    assert "unused_tokens" not in kept[0]

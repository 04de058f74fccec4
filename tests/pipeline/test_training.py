"""Training trains: every example in its turn, a loss that falls, a reward that rises."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest

from tests.recipes import Recipes
from tests.runs import metrics
from thence.pipeline.run import run


def test_every_example_is_trained_once_an_epoch_and_held_out_ones_never(recipes: Recipes) -> None:
    data = recipes.folder / "data.jsonl"
    rows = [{"prompt": f"{i}?", "completion": "1" * (1 + i % 7)} for i in range(21)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipes(["sft"], data={"source": [str(data)]})
    recipe["sft"] = {"epochs": 2, "batch": 8}
    lines = metrics(run(recipe))
    assert [line["sequences"] for line in lines] == [8, 8, 4, 8, 8, 4]  # limit = 20
    responses = sum(len(row["completion"]) + 1 for row in rows[:20])
    assert sum(line["trained_tokens"] for line in lines) == 2 * responses
    assert [line["epoch"] for line in lines] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    recipe["sft"] |= {"held_out": 5}
    lines = metrics(run(recipe, {"folder": str(recipes.folder / "held")}))
    assert [line["sequences"] for line in lines] == [8, 7, 8, 7]
    assert ["held_out_loss" in line for line in lines] == [True, False, False, True]


def test_prompts_are_trained_only_when_asked_for(recipes: Recipes) -> None:
    folder = str(recipes.folder / "all")
    response, whole = (
        metrics(run(recipes(["sft"])))[0],
        metrics(run(recipes(["sft"], sft={"train_on": "all"}, folder=folder)))[0],
    )
    assert response["tokens"] == whole["tokens"]
    assert whole["trained_tokens"] == whole["tokens"] - whole["sequences"]
    assert response["trained_tokens"] < whole["trained_tokens"]


def test_rl_draws_every_prompt_once_before_any_comes_again(recipes: Recipes) -> None:
    log = recipes.folder / "asked.txt"
    file = recipes.folder / "asking.py"
    file.write_text(
        "def reward(prompt, response, answer):\n"
        f"    open({str(log)!r}, 'a').write(prompt + '\\n')\n"
        "    return float(len(response))\n"
    )
    rl = {"steps": 10, "prompts": 4, "rollouts": 2, "reward": f"{file}:reward", "lr": 1e-6, "max_tokens": 2}
    run(recipes(["rl"], rl=rl))  # 20 prompts: five steps a pass, two passes
    asked = log.read_text().split("\n")[1:-1]  # the first call tries the function before the first step
    assert len(asked) == 80
    for half in (asked[:40], asked[40:]):
        assert set(Counter(half).values()) == {2}


def test_the_loss_of_sft_falls(recipes: Recipes) -> None:
    sft = {"steps": 40, "lr": 3e-2, "held_out": 4, "batch": 16, "schedule": "constant", "warmup": 0.0}
    lines = metrics(run(recipes(["sft"], sft=sft, data={"limit": 100})))
    assert lines[-1]["loss"] < 0.75 * lines[0]["loss"]
    assert lines[-1]["held_out_loss"] < 0.75 * lines[0]["held_out_loss"]


@pytest.mark.matrix(1)
@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "dapo"])
def test_rl_raises_a_trivial_reward(recipes: Recipes, method: str) -> None:
    # groups that agree stay in: the mean reward of those that do not says little about the policy
    options = {"dynamic_sampling": False} if method == "dapo" else {}
    rl = {"method": method, "options": options, "steps": 30, "prompts": 4, "rollouts": 8, "mini_batch": 2, "lr": 2e-2}
    lines = metrics(run(recipes(["rl"], rl=rl)))
    first, last = (sum(line["reward"] for line in part) / len(part) for part in (lines[:3], lines[-3:]))
    assert first < 0.2
    assert last > first + 0.4


@pytest.mark.parametrize("found", ["none", "one"])
def test_a_step_of_dapo_that_finds_too_few_groups_trains_what_it_has(recipes: Recipes, found: str) -> None:
    file = recipes.folder / "differs.py"
    # "one": the responses to one prompt of twenty differ in reward, those to the others never do
    differs = {"none": "False", "one": "prompt == first"}[found]
    file.write_text(
        "first = None\n"
        "def reward(prompt, response, answer):\n"
        "    global first\n"
        "    first = first or prompt\n"
        f"    return float(len(set(response))) if {differs} else 0.5\n"
    )
    options = {"max_generations": 1, "overlong_buffer": 0}
    rl = {"method": "dapo", "options": options, "steps": 1, "mini_batch": 2, "reward": f"{file}:reward"}
    lines = metrics(run(recipes(["rl"], rl=rl)))
    assert [line["sequences"] for line in lines] == [{"none": 0, "one": 4}[found]]
    assert math.isfinite(lines[0]["loss"])

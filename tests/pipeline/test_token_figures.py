"""What is kept of each token of a few responses of an RL step."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tests.recipes import Recipes
from thence.data.trajectory import Prompt, Trajectory
from thence.objective import TokenStats
from thence.pipeline.run import run
from thence.pipeline.token_figures import MOST_TOKENS, _chosen, _short


def response(verdict: str, length: int = 3) -> Trajectory:
    return Trajectory(Prompt(0, (1,)), tuple(range(length)), verdict=verdict)


def test_a_right_and_another_response_are_chosen_and_long_ones_passed_over() -> None:
    right, wrong, other = response("right"), response("wrong"), response("unknown")
    assert _chosen([wrong, other, right]) == [right, wrong]
    assert _chosen([right, right, right]) == [right, right]
    assert _chosen([response("right", MOST_TOKENS + 1), wrong]) == [wrong]
    assert _chosen([replace(wrong, response_ids=())]) == []


def test_numbers_are_short_and_finite() -> None:
    assert _short(torch.tensor([0.123456, float("nan"), float("inf")])) == [0.1235, 0.0, 0.0]
    assert TokenStats.__doc__ and "slope_T" in TokenStats.__doc__


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_keeps_the_weights_of_tokens_as_the_step_gave_them(recipes: Recipes, packing: bool) -> None:
    recipe = recipes(["rl"], rl={"method": "grpo", "steps": 2, "prompts": 2, "rollouts": 4, "packing": packing})
    folder = run(recipe)
    path = folder / "stages" / "rl" / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    held = [row for row in rows if "weighed" in row]
    assert {row["step"] for row in held} == {1, 2} and len(held) <= 4
    for row in held:
        weighed = row["weighed"]
        assert {len(values) for values in weighed.values()} == {row["tokens"]}
        assert all(logp <= 0 for logp in weighed["log-probability"])
        signs = {(weight > 0) - (weight < 0) for weight in weighed["weight"]}
        assert signs == {(a > 0) - (a < 0) for a in weighed["advantage"]}
        same = [r["score"] for r in rows if (r["step"], r["index"]) == (row["step"], row["index"])]
        mean = sum(same) / len(same)
        assert weighed["advantage"][0] == pytest.approx(row["score"] - mean, abs=1e-3)

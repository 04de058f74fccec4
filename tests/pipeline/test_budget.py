"""Stages that end at a budget, stages with a fault on purpose, and the FLOPs that are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.recipes import llama, world_recipe
from thence.accounting.flops import causal_pairs, forward_flops, parameters, sampling_flops, training_flops
from thence.accounting.meter import FlopMeter
from thence.errors import UserError
from thence.pipeline.context import Budget
from thence.pipeline.rl_stage import expected_steps
from thence.pipeline.run import run
from thence.recipe import Rl, load_recipe

SIZES = {"num_hidden_layers": 2, "tie_word_embeddings": True}


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return world_recipe(
        tmp_path,
        ["sft"],
        "response.count('1') / 9",
        SIZES,
        folder=str(tmp_path / "run"),
        data={"limit": 32},
        sft={"epochs": 4, "warmup": 0.0},
        rl={"steps": 50, "max_tokens": 9, "checkpoint_every": 2},
    )


def lines(recipe: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    """The metrics of a recipe with other settings."""
    own = {**recipe, **{k: {**recipe[k], **v} if isinstance(v, dict) else v for k, v in changes.items()}}
    folder = run(own)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def total(found: list[dict[str, Any]], key: str) -> float:
    return sum(line[key] for line in found)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.77])
def test_sft_ends_at_the_step_nearest_to_its_flops_and_so_does_its_schedule(
    recipe: dict[str, Any], tmp_path: Path, share: float
) -> None:
    whole = lines(recipe)
    budget = share * total(whole, "flops")
    found = lines(recipe, folder=str(tmp_path / "less"), sft={"flops": budget})
    assert abs(total(found, "flops") - budget) <= found[-1]["flops"]
    assert len(found) == pytest.approx(share * len(whole), abs=1.5)
    assert found[-1]["lr"] < 0.6 * found[0]["lr"]  # cosine to a tenth, over the steps that there are


def test_rl_ends_at_its_tokens_also_when_it_was_stopped_in_between(recipe: dict[str, Any], tmp_path: Path) -> None:
    whole = lines(recipe, stages=["rl"], rl={"tokens": 900})
    assert abs(total(whole, "trained_tokens") - 900) <= max(line["trained_tokens"] for line in whole)
    (tmp_path / "own.py").write_text(
        "import os\n"
        "def share(prompt, response, answer):\n"
        f"    here = {str(tmp_path / 'count')!r}\n"
        "    n = int(open(here).read()) if os.path.exists(here) else 0\n"
        "    open(here, 'w').write(str(n + 1))\n"
        "    if n == 70: raise ValueError('stop')\n"
        "    return response.count('1') / 9\n"
    )
    with pytest.raises(UserError, match="stop"):
        lines(recipe, folder=str(tmp_path / "again"), stages=["rl"], rl={"tokens": 900})
    again = lines(recipe, folder=str(tmp_path / "again"), stages=["rl"], rl={"tokens": 900})
    assert [line["loss"] for line in again] == [line["loss"] for line in whole]


def test_a_schedule_over_all_steps_follows_the_share_of_the_budget_that_is_spent() -> None:
    stage = Rl(steps=1000, flops=100.0)
    assert expected_steps(stage, 0, Budget("flops", 100.0)) == 1000
    assert expected_steps(stage, 5, Budget("flops", 100.0, spent=25.0)) == 20
    assert expected_steps(stage, 9, Budget("flops", 100.0, spent=99.0)) == 10
    assert expected_steps(Rl(steps=7), 5, None) == 7


def test_rl_with_a_budget_refuses_a_schedule_that_it_could_not_end(recipe: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="schedule"):
        lines(recipe, stages=["rl"], rl={"flops": 1e9, "schedule": "cosine"})


def test_a_stage_has_one_budget() -> None:
    with pytest.raises(UserError, match="one of flops and tokens"):
        load_recipe("quickstart", {"sft.flops": 1e9, "sft.tokens": 10})


def test_a_fault_is_given_as_a_name_a_list_or_a_table() -> None:
    for value in ("mean-of-means", ["mean-of-means"], {"names": ["mean-of-means"], "accumulation": 8}):
        stage = load_recipe("quickstart", {"sft.fault": value}).stage("sft")
        assert stage.fault.names == ["mean-of-means"] and stage.fault.accumulation == 8
    assert load_recipe(load_recipe("quickstart", {"sft.fault": "rank-means"}).resolved()).stage("sft").fault


def test_faults_change_training_only_where_something_is_lost(recipe: dict[str, Any], tmp_path: Path) -> None:
    def weights(name: str, **fault: Any) -> dict[str, torch.Tensor]:
        lines(recipe, folder=str(tmp_path / name), sft={"steps": 3, **({"fault": fault} if fault else {})})
        return load_file(tmp_path / name / "stages" / "sft" / "model" / "model.safetensors")

    def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return max(float((a[name] - b[name]).abs().max()) for name in a)

    clean = weights("clean")
    assert distance(clean, weights("two", names=["first-and-last-only"], accumulation=2)) < 1e-6
    for names, cut in (
        (["first-micro-batch-only"], {"accumulation": 2}),
        (["first-and-last-only"], {"accumulation": 4}),
        (["mean-of-means"], {"accumulation": 4}),
        (["rank-means"], {"accumulation": 1, "ranks": 4}),
    ):
        assert distance(clean, weights(names[0] + "-", names=names, **cut)) > 1e-4, names


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"names": ["mean-of-meanz"]}, "no fault"),
        ({"names": ["mean-of-means"], "accumulation": 3}, "cannot be cut"),
        ({"names": ["gradient-leak"]}, "no checkpoint keeps"),
    ],
)
def test_faults_that_cannot_be_run_are_refused(recipe: dict[str, Any], fault: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        lines(recipe, sft={"fault": fault})


def test_shards_clipped_by_themselves_train_something_else(recipe: dict[str, Any], tmp_path: Path) -> None:
    def weights(name: str, **changed: Any) -> torch.Tensor:
        lines(recipe, folder=str(tmp_path / name), sft={"steps": 3, "clip_norm": 1e-3, **changed})
        state = load_file(tmp_path / name / "stages" / "sft" / "model" / "model.safetensors")
        return torch.cat([tensor.flatten() for tensor in state.values()])

    clean = weights("clean")
    for ranks, changes in ((1, False), (4, True)):
        fault = {"names": ["shard-clipped"], "accumulation": 1, "ranks": ranks}
        far = float((weights(f"by {ranks}", fault=fault) - clean).abs().max())
        assert (far > 1e-5) if changes else (far < 1e-6), ranks


def test_a_fault_of_clipping_is_refused_where_nothing_is_clipped(recipe: dict[str, Any]) -> None:
    fault = {"names": ["shard-clipped"], "accumulation": 1, "ranks": 4}
    with pytest.raises(UserError, match="nothing is clipped") as refused:
        lines(recipe, sft={"fault": fault, "clip_norm": 0.0})
    assert refused.value.field == "sft.clip_norm"


def test_executed_flops_of_a_step_are_those_of_its_rows() -> None:
    counts, meter = parameters(llama(**SIZES)), FlopMeter(llama(**SIZES))
    meter.trained([5, 9], 8)
    expected = training_flops(counts, 14, causal_pairs(5) + causal_pairs(9), 8)
    assert meter.total == pytest.approx(expected)
    meter.scored([5, 9], 8)
    assert meter.total == pytest.approx(expected * 4 / 3)


def test_a_prompt_is_read_once_for_all_its_responses() -> None:
    counts = parameters(llama(**SIZES))
    one, same, other = FlopMeter(llama(**SIZES)), FlopMeter(llama(**SIZES)), FlopMeter(llama(**SIZES))
    one.sampled([(1, 2, 3)], [6])
    assert one.total == pytest.approx(sampling_flops(counts, 3, 6))
    same.sampled([(1, 2, 3)] * 2, [6, 6])
    other.sampled([(1, 2, 3), (1, 2, 4)], [6, 6])
    reading = forward_flops(counts, 3, causal_pairs(3), 1)
    assert other.total == pytest.approx(2 * (one.total or 0))
    assert (other.total or 0) - (same.total or 0) == pytest.approx(reading)


def test_flops_of_a_family_that_cannot_be_counted_are_not_known() -> None:
    meter = FlopMeter({"model_type": "gpt2"})
    meter.trained([5], 5)
    assert meter.total is None

"""Runs whose ranks share rows, each with a piece of the tokens, sample, train and resume as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.on_ranks import assert_same, case, drive, largest_difference, lines, sampled
from thence.errors import RecipeError
from thence.pipeline.layout import check_layout
from thence.recipe import load_recipe

GRPO = {"method": "grpo", "mini_batch": 2, "packing": True}
METHODS = {
    "gspo": {"method": "gspo", "options": {"clip_low": 0.01, "clip_high": 0.02}},
    "dppo": {"method": "dppo", "mini_batch": 4, "options": {"low": 0.001, "high": 0.001}},
    "luffy": {"method": "luffy", "mini_batch": 4},
    "srft": {"method": "srft", "options": {"entropy_level": "batch"}},
    "relift": {"method": "relift", "rollouts": 2, "options": {"sft_batch": 3}},
    "sdpo": {"method": "sdpo", "options": {"form": "{solution};{prompt}", "average_rate": 0.5}},
    "sdft-jsd": {
        "method": "sdft",
        "options": {"form": "{solution};{prompt}", "divergence": "jsd", "top_k": 6, "tail": True},
    },
    "sdpo-whole": {
        "method": "sdpo",
        "options": {"form": "{solution};{prompt}", "divergence": "reverse-kl", "average_rate": 0.5},
    },
    "trust": {"method": "grpo", "importance_bound": 2.0},
}
EXACT = 1e-12
"""Largest difference of a weight after four steps in float64. Sums over ranks are added in another order."""


def in_pieces(base: dict[str, Any], parallel: str = "ddp", size: int = 2) -> dict[str, Any]:
    return {**base, "parallel": parallel, "sharding": {"context": size}}


@pytest.fixture(scope="module")
def quick(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pieces")
    reference = {**GRPO, "options": {"kl": 0.05}}
    cases = [case(base, folder / "grpo-1", 1, GRPO), case(in_pieces(base), folder / "grpo-2", 2, GRPO)]
    cases += [case(base, folder / "reference-1", 1, reference)]
    cases += [case(in_pieces(base, "fsdp2"), folder / "reference-2", 2, reference)]
    moved = folder / "moved"
    cases += [case(in_pieces(base), moved, 2, GRPO, stop=2), case(base, moved, 1, GRPO, suffix="-last")]
    sft = {"lr": 1e-2, "batch": 3, "steps": 6, "checkpoint_every": 1, "packing": True, "held_out": 3}
    sft = {**base, "stages": ["sft"], "sft": sft}
    cases += [case(sft, folder / "sft-1", 1, {}), case(in_pieces(sft, "fsdp2"), folder / "sft-2", 2, {})]
    weighed = {**sft, "sft": {**sft["sft"], "method": "gift", "options": {"beta": 3.0}}}
    cases += [case(weighed, folder / "gift-1", 1, {}), case(in_pieces(weighed, "fsdp2"), folder / "gift-2", 2, {})]
    drive(folder, cases)
    return folder


@pytest.mark.parametrize("name", ["grpo", "reference"])
def test_two_ranks_that_share_rows_sample_and_train_what_one_process_does(name: str, quick: Path) -> None:
    assert_same(quick / f"{name}-2", quick / f"{name}-1")
    assert largest_difference(quick / f"{name}-2", quick / f"{name}-1") < EXACT


@pytest.mark.parametrize("name", ["sft", "gift"])
def test_sft_in_pieces_is_that_of_one_process_and_so_is_the_loss_on_held_out_rows(name: str, quick: Path) -> None:
    sampled(quick / f"{name}-2")
    assert largest_difference(quick / f"{name}-2", quick / f"{name}-1", "sft") < EXACT
    for got, expected in zip(lines(quick / f"{name}-2"), lines(quick / f"{name}-1"), strict=True):
        for key in {"loss", "held_out_loss", "nll", "blend/mean"} & expected.keys():
            assert got[key] == pytest.approx(expected[key], rel=1e-10), key
    assert any("held_out_loss" in line for line in lines(quick / f"{name}-2"))


def test_a_run_moves_from_ranks_that_share_rows_to_one_process(quick: Path) -> None:
    assert sampled(quick / "moved") + sampled(quick / "moved", "-last")
    assert largest_difference(quick / "moved", quick / "grpo-1") < EXACT


@pytest.fixture(scope="module")
def slow(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slow")
    cases = []
    for number, (name, rl) in enumerate(METHODS.items()):
        layout = ("ddp", "fsdp2")[number % 2]
        rl = {"mini_batch": 2, "packing": True, **rl}
        cases += [case(base, folder / f"{name}-1", 1, rl), case(in_pieces(base, layout), folder / f"{name}-2", 2, rl)]
    four = {**GRPO, "mini_batch": 4}
    cases += [case(base, folder / "four-1", 1, four), case(in_pieces(base, "fsdp2"), folder / "four-2", 4, four)]
    drive(folder, cases)
    return folder


@pytest.mark.everything
@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS, "four"])
def test_ranks_that_share_rows_are_as_one_process_with_every_kind_of_method(name: str, slow: Path) -> None:
    assert_same(slow / f"{name}-2", slow / f"{name}-1")


@pytest.mark.parametrize(
    ("settings", "world", "field"),
    [
        ({"sharding": {"context": 3}, "sft": {"packing": True}}, 4, "sharding.context"),
        ({"sharding": {"context": 2}, "sft": {"packing": True}}, 1, "sharding.context"),
        ({"sharding": {"context": 2}}, 2, "sft.packing"),
    ],
)
def test_pieces_that_cannot_be_are_refused_before_anything_runs(settings: Any, world: int, field: str) -> None:
    recipe = load_recipe({"model": {"path": "world:chain/rich"}, "stages": ["sft"], **settings})
    with pytest.raises(RecipeError) as refused:
        check_layout(recipe, world)
    assert refused.value.field == field

"""Runs whose weights are cut over ranks (FSDP2) sample, train and resume as one process does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.pipeline.on_ranks import assert_same, case, drive, largest_difference, lines, sampled
from thence.errors import RecipeError
from thence.pipeline.layout import check_layout, layout_of
from thence.recipe import load_recipe

FORM = {"form": "{solution};{prompt}"}
QUICK = {"grpo": {"method": "grpo", "mini_batch": 2}, "reference": {"method": "grpo", "options": {"kl": 0.05}}}
METHODS = {
    "dapo": {"method": "dapo", "mini_batch": 2, "options": {"overlong_tokens": 12, "overlong_buffer": 4}},
    "gspo": {"method": "gspo", "mini_batch": 2, "options": {"clip_low": 0.01, "clip_high": 0.02}},
    "cispo": {"method": "cispo", "mini_batch": 2, "options": {"cap": 1.02}},
    "ipo": {"method": "ipo", "mini_batch": 2, "options": {"bound": 0.001}},
    "luffy": {"method": "luffy"},
    "srft": {"method": "srft", "options": {"entropy_level": "batch"}},
    "relift": {"method": "relift", "rollouts": 2, "options": {"sft_batch": 3}},
    "prefix_rft": {"method": "prefix_rft"},
    "hpt": {"method": "hpt", "options": {"gate": 0.3}},
    "exgrpo": {"method": "exgrpo", "steps": 5, "options": {"start": 0.0}},
    "trapo": {"method": "trapo", "rollouts": 8},
    "sdft": {"method": "sdft", "mini_batch": 2, "options": {"form": "{solution};{prompt}"}},
    "sdpo": {"method": "sdpo", "mini_batch": 2, "options": {"form": "{solution};{prompt}", "average_rate": 0.5}},
    "sdft-jsd": {"method": "sdft", "mini_batch": 2, "options": {**FORM, "divergence": "jsd", "top_k": 6}},
    "sdft-now": {"method": "sdft", "options": {**FORM, "divergence": "forward-kl", "teacher": "current"}},
    "sdpo-whole": {"method": "sdpo", "mini_batch": 2, "options": {**FORM, "divergence": "reverse-kl"}},
    "trust": {"method": "grpo", "importance_bound": 2.0},
}
EXACT = 1e-12
"""Largest difference of a weight after four steps in float64. Sums over ranks are added in another order."""


def cut(base: dict[str, Any], parallel: str = "fsdp2", **sharding: Any) -> dict[str, Any]:
    return {**base, "parallel": parallel, "sharding": sharding}


@pytest.fixture(scope="module")
def quick(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    cases = []
    for name, rl in QUICK.items():
        cases += [case(base, folder / f"{name}-1", 1, rl), case(cut(base), folder / f"{name}-2", 2, rl)]
    cases.append(case(cut(base), folder / "one-rank", 1, QUICK["grpo"]))
    moved = folder / "moved"
    cases += [case(base, moved, 1, QUICK["grpo"], stop=1)]
    cases += [case(cut(base), moved, 2, QUICK["grpo"], suffix="-two", stop=3)]
    cases += [case(base, moved, 1, QUICK["grpo"], suffix="-last")]
    cases += [case(cut(base), folder / "stopped", 2, QUICK["grpo"], stop=2)]
    sft = {**base, "stages": ["sft"], "sft": {"lr": 1e-2, "batch": 3, "steps": 6, "checkpoint_every": 1}}
    cases += [case(sft, folder / "sft-1", 1, {})]
    cases += [case(cut(sft, reshard_after_forward=False, sum_every_pass=False), folder / "sft-2", 2, {})]
    weighed = {**sft, "sft": {**sft["sft"], "method": "gift", "options": {"beta": 3.0}}}
    cases += [case(weighed, folder / "gift-1", 1, {}), case(cut(weighed), folder / "gift-2", 2, {}, stop=3)]
    cases += [case(cut(weighed), folder / "gift-2", 2, {}, suffix="-more")]
    drive(folder, cases)
    return folder


def test_a_reference_of_whole_distributions_is_cut_too_and_is_the_start_of_the_stage_after_a_stop(quick: Path) -> None:
    assert not list(quick.glob("gift*-notes/error-*"))
    assert largest_difference(quick / "gift-2", quick / "gift-1", "sft") < EXACT


@pytest.mark.parametrize("name", QUICK)
def test_two_ranks_that_share_weights_sample_and_train_what_one_process_does(name: str, quick: Path) -> None:
    assert_same(quick / f"{name}-2", quick / f"{name}-1")
    assert largest_difference(quick / f"{name}-2", quick / f"{name}-1") < EXACT


def test_one_rank_is_as_a_process_without_ranks(quick: Path) -> None:
    assert_same(quick / "one-rank", quick / "grpo-1")


def test_sums_once_a_step_from_whole_gradients_are_the_same_sums(quick: Path) -> None:
    sampled(quick / "sft-2")
    assert largest_difference(quick / "sft-2", quick / "sft-1", "sft") < EXACT


def test_a_run_moves_from_one_process_to_shared_weights_and_back(quick: Path) -> None:
    assert sampled(quick / "moved") + sampled(quick / "moved", "-two") + sampled(quick / "moved", "-last")
    assert len(lines(quick / "moved")) == 4
    assert largest_difference(quick / "moved", quick / "grpo-1") < EXACT


def test_each_rank_writes_its_part_of_a_checkpoint_and_nothing_is_pickled(quick: Path) -> None:
    (folder,) = (quick / "stopped" / "stages" / "rl" / "checkpoints").glob("step-*")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    parts = sorted(folder.glob("*.safetensors"))
    assert [path.name.split("-")[1] for path in parts] == ["00001", "00002"]
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    sizes = []
    for path in parts:
        tensors = load_file(path).values()
        sizes.append(sum(value.numel() for value in tensors if value.ndim))
    assert abs(sizes[0] - sizes[1]) < 0.05 * sum(sizes)


def test_the_published_model_is_whole(quick: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(quick / "grpo-2" / "stages" / "rl" / "model")
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel()
        for p in AutoModelForCausalLM.from_pretrained(quick / "grpo-1" / "stages" / "rl" / "model").parameters()
    )


@pytest.fixture(scope="module")
def slow(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slow")
    cases = []
    for name, rl in METHODS.items():
        cases += [case(base, folder / f"{name}-1", 1, rl), case(cut(base), folder / f"{name}-2", 2, rl)]
    four = {**QUICK["grpo"], "mini_batch": 4}
    cases += [case(base, folder / "grpo-1", 1, four), case(cut(base), folder / "grpo-fsdp2", 4, four)]
    cases += [case(cut(base, "hsdp", replicas=2), folder / "grpo-hsdp", 4, four)]
    moved = folder / "moved"
    cases += [case(base, moved, 1, four, stop=1), case(cut(base), moved, 4, four, suffix="-four", stop=2)]
    cases += [case(cut(base, "hsdp", replicas=2), moved, 4, four, suffix="-hsdp", stop=3)]
    cases += [case(cut(base), moved, 2, four, suffix="-two")]
    taught = METHODS["sdpo"]  # its moving average is part of the state, cut as the weights are
    cases += [case(base, folder / "taught", 1, taught, stop=1)]
    cases += [case(cut(base), folder / "taught", 2, taught, suffix="-two", stop=3)]
    cases += [case(base, folder / "taught", 1, taught, suffix="-last")]
    drive(folder, cases)
    return folder


@pytest.mark.everything
@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_shared_weights_are_as_one_process_with_every_method(name: str, slow: Path) -> None:
    assert_same(slow / f"{name}-2", slow / f"{name}-1")


@pytest.mark.everything
@pytest.mark.slow
def test_a_teachers_moving_average_moves_over_layouts(slow: Path) -> None:
    for suffix in ("", "-two", "-last"):
        sampled(slow / "taught", suffix)
    assert largest_difference(slow / "taught", slow / "sdpo-1") < EXACT


@pytest.mark.everything
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp2", "hsdp"])
def test_four_ranks_are_as_one_process(layout: str, slow: Path) -> None:
    assert_same(slow / f"grpo-{layout}", slow / "grpo-1")


@pytest.mark.everything
@pytest.mark.slow
def test_a_run_moves_over_numbers_of_ranks_and_layouts(slow: Path) -> None:
    for suffix in ("", "-four", "-hsdp", "-two"):
        sampled(slow / "moved", suffix)
    assert largest_difference(slow / "moved", slow / "grpo-1") < EXACT


@pytest.mark.parametrize(
    ("settings", "world", "field"),
    [
        ({"parallel": "none"}, 2, "parallel"),
        ({"parallel": "hsdp"}, 4, "sharding.replicas"),
        ({"parallel": "hsdp", "sharding": {"replicas": 3}}, 4, "sharding.replicas"),
        ({"parallel": "fsdp2", "sharding": {"replicas": 2}}, 4, "sharding.replicas"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_before_anything_runs(settings: Any, world: int, field: str) -> None:
    recipe = load_recipe({"model": {"path": "world:chain/rich"}, "stages": ["sft"], **settings})
    with pytest.raises(RecipeError) as refused:
        check_layout(recipe, world)
    assert refused.value.field == field


def test_auto_cuts_what_a_device_cannot_hold_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe({"model": {"path": "world:chain/rich"}, "stages": ["sft", "eval"]})
    ranks: Any = TwoRanks()
    found = []
    for room in (1e12, 1e5):
        monkeypatch.setattr("thence.pipeline.layout.memory_of", lambda device, room=room: room)
        found.append([layout_of(recipe, stage, recipe.model, ranks, "cpu") for stage in ("sft", "eval")])
    assert found == [["ddp", "ddp"], ["fsdp2", "ddp"]]


class TwoRanks:
    rank, world = 0, 2

    def gather(self, value: Any) -> list[Any]:
        return [value, value]

"""Runs that train adapters: they sample what they train, publish merged models, and move over ranks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import thence.pipeline.rl_update as rl_update
from tests.pipeline.on_ranks import assert_same, case, drive, largest_difference, lines, sampled
from tests.recipes import Recipes
from tests.runs import stop_in_rl, weights
from thence.errors import RecipeError, UserError
from thence.pipeline.layout import layout_of
from thence.pipeline.run import run
from thence.recipe import load_recipe
from thence.train.adapted import merge_checkpoint
from thence.train.export import export

LORA = {"rank": 2}
GRPO = {"method": "grpo", "mini_batch": 2}
REFERENCE = {"method": "grpo", "options": {"kl": 0.05}}
SFT = {"lr": 1e-2, "batch": 3, "steps": 4, "checkpoint_every": 1}
EXACT = 1e-12


def lora(base: dict[str, Any], parallel: str = "auto", **settings: Any) -> dict[str, Any]:
    return {**base, "parallel": parallel, "model": {**base["model"], "lora": {**LORA, **settings}}}


@pytest.fixture(scope="module")
def runs(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    cases = []
    for name, rl in {"grpo": GRPO, "reference": REFERENCE}.items():
        cases += [case(lora(base), folder / f"{name}-1", 1, rl)]
        cases += [case(lora(base, layout), folder / f"{name}-{layout}", 2, rl) for layout in ("ddp", "fsdp2")]
    moved = folder / "moved"
    cases += [case(lora(base), moved, 1, GRPO, stop=1), case(lora(base, "fsdp2"), moved, 2, GRPO, suffix="-2", stop=3)]
    cases += [case(lora(base), moved, 1, GRPO, suffix="-3")]
    cases += [case(lora(base, "fsdp2"), folder / "parts", 2, GRPO, stop=2)]
    for name, layout in {"again": "auto", "again-fsdp2": "fsdp2"}.items():
        world = 2 if layout == "fsdp2" else 1
        cases += [case(lora(base, layout), folder / name, world, GRPO, stop=2)]
        cases += [case(lora(base, layout), folder / name, world, GRPO, suffix="-on")]
    one_row = {**lora(base, modules_to_save=["model.norm"]), "stages": ["sft"], "sft": {**SFT, "batch": 1}}
    cases += [case(one_row, folder / "row-1", 1, {})]
    cases += [case({**one_row, "parallel": layout}, folder / f"row-{layout}", 2, {}) for layout in ("ddp", "fsdp2")]
    drive(folder, cases)
    return folder


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["grpo", "reference"])
def test_two_ranks_train_the_adapters_of_one_process(name: str, layout: str, runs: Path) -> None:
    assert_same(runs / f"{name}-{layout}", runs / f"{name}-1")
    assert largest_difference(runs / f"{name}-{layout}", runs / f"{name}-1") < EXACT
    assert largest_difference(runs / "grpo-1", runs / "reference-1") > 1e-6


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_rank_without_rows_changes_nothing(layout: str, runs: Path) -> None:
    sampled(runs / f"row-{layout}")
    assert largest_difference(runs / f"row-{layout}", runs / "row-1", "sft") < EXACT


def test_a_run_with_adapters_moves_over_layouts(runs: Path) -> None:
    assert sampled(runs / "moved") + sampled(runs / "moved", "-2") + sampled(runs / "moved", "-3")
    assert len(lines(runs / "moved")) == 4
    assert largest_difference(runs / "moved", runs / "grpo-1") < EXACT


@pytest.mark.parametrize(("again", "once"), [("again", "grpo-1"), ("again-fsdp2", "grpo-fsdp2")])
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bits(again: str, once: str, runs: Path) -> None:
    sampled(runs / again, "-on")
    for what in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        found, expected = (load_file(runs / name / "stages" / "rl" / what) for name in (again, once))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["parts", "grpo-1"])
def test_a_checkpoint_holds_adapters_alone(name: str, runs: Path) -> None:
    (folder,) = (runs / name / "stages" / "rl" / "checkpoints").glob("step-*")
    found = {key for file in folder.glob("*.safetensors") for key in load_file(file)}
    assert found and all("lora_" in key for key in found)


def test_the_adapter_of_a_stage_is_peft_s_and_gives_the_published_model(runs: Path) -> None:
    from peft import PeftModel

    recipe = load_recipe(runs / "row-fsdp2" / "recipe.toml")
    stage = runs / "row-fsdp2" / "stages" / "sft"
    published = AutoModelForCausalLM.from_pretrained(stage / "model", dtype=torch.float64)
    torch.manual_seed(recipe.seed)  # the random weights that the run began with
    base = AutoModelForCausalLM.from_config(published.config, dtype=torch.float64)
    opened = PeftModel.from_pretrained(base, str(stage / "adapter"))
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        difference = opened(input_ids=tokens).logits - published(input_ids=tokens).logits
    assert difference.abs().max() < 1e-6
    saved = load_file(stage / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.norm.weight" in saved
    configuration = json.loads((stage / "adapter" / "adapter_config.json").read_text())
    assert configuration["base_model_name_or_path"] is None  # random weights


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_sampler_samples_from_what_is_trained(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The KL between the sampler's distribution and the trainer's, by sampled tokens (k3), in every rollout batch."""
    found: list[float] = []
    take = rl_update.Update.take

    def heard(update: Any, trajectories: Any, metrics: Any) -> None:
        rows = [rl_update.bare_row(t) for t in trajectories]
        scored = update.trainer.statistics(rows, update.stage.temperature)
        for trajectory, (trained, _) in zip(trajectories, scored, strict=True):
            apart = trained.double() - torch.tensor(trajectory.sampler_logps, dtype=torch.float64)
            found.append(float((apart.exp() - 1 - apart).mean()))
        take(update, trajectories, metrics)

    monkeypatch.setattr(rl_update.Update, "take", heard)
    recipe = Recipes(tmp_path)(["rl"], rl={"steps": 3, "lr": 0.1}, model={"compute_dtype": dtype, "lora": {"rank": 4}})
    run(recipe)
    assert len(found) > 8 and max(found) < 1e-6
    moved = load_file(tmp_path / "run" / "stages" / "rl" / "adapter" / "adapter_model.safetensors")
    assert max(float(value.abs().max()) for name, value in moved.items() if "lora_B" in name) > 0.1


def test_a_stage_starts_from_the_merged_model_of_the_one_before_with_new_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipes(tmp_path)(["sft", "rl", "eval"], model={"lora": {"rank": 2}})
    stop_in_rl(recipe, monkeypatch)
    merged = weights(tmp_path / "run", "sft")
    assert not any("lora" in name or "base_layer" in name for name in merged)
    run(recipe)
    after = weights(tmp_path / "run", "rl")
    assert after.keys() == merged.keys()
    assert any(not torch.equal(after[name], merged[name]) for name in merged)
    assert torch.equal(after["model.norm.weight"], merged["model.norm.weight"])
    configuration = json.loads((tmp_path / "run" / "stages" / "rl" / "adapter" / "adapter_config.json").read_text())
    assert configuration["base_model_name_or_path"] == str((tmp_path / "run" / "stages" / "sft" / "model").absolute())
    assert (tmp_path / "run" / "stages" / "eval" / "result.json").exists()
    assert run(recipe) == tmp_path / "run"  # nothing is foreign in it
    run(recipe, restart=True)


def test_the_reference_of_a_kl_term_is_no_second_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(model: Any, *_: Any) -> Any:
        raise AssertionError("a copy was made")

    monkeypatch.setattr("thence.pipeline.context.copy", SimpleNamespace(deepcopy=refused))
    logged = []
    for kl in (0.0, 5.0):
        options = {"kl": kl}
        recipe = Recipes(tmp_path)(
            ["rl"],
            folder=str(tmp_path / f"kl-{kl}"),
            rl={"steps": 3, "options": options} if kl else {"steps": 3},
            model={"lora": {"rank": 2}},
        )
        run(recipe)
        logged.append([line["loss"] for line in lines(tmp_path / f"kl-{kl}")])
    assert logged[0][0] == pytest.approx(logged[1][0], abs=1e-6)  # at first the policy is its reference
    assert logged[0][2] != pytest.approx(logged[1][2], abs=1e-6)


def test_a_checkpoint_of_adapters_is_merged_and_not_exported(runs: Path, tmp_path: Path) -> None:
    (checkpoint,) = (runs / "grpo-fsdp2" / "stages" / "rl" / "checkpoints").glob("step-*")
    with pytest.raises(UserError, match="adapters"):
        export(checkpoint, tmp_path / "exported")
    merge_checkpoint(checkpoint, tmp_path / "merged")
    found, expected = load_file(tmp_path / "merged" / "model.safetensors"), weights(runs / "grpo-fsdp2", "rl")
    assert found.keys() == expected.keys()
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-15
    configurations = [
        json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        for folder in (tmp_path / "merged", runs / "grpo-fsdp2" / "stages" / "rl" / "model")
    ]
    assert configurations[0] == configurations[1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": {"lora": {"rank": 2, "targets": ["query"]}}}, "'query' is not there"),
        ({"model": {"lora": {"rank": 2}}, "sft": {"fault": "sum-of-means"}}, "faults are defined on the weights"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(settings: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        run(Recipes(tmp_path)(["sft"], **settings))
    assert not (tmp_path / "run" / "stages").exists()


def test_adapters_are_not_changed_when_a_run_is_resumed(tmp_path: Path) -> None:
    recipe = Recipes(tmp_path)(["sft"], model={"lora": {"rank": 2}})
    run(recipe)
    other = Recipes(tmp_path)(["sft"], model={"lora": {"rank": 4}}, sft={"steps": 4})
    with pytest.raises(UserError, match=r"model\.lora"):
        run(other)


@pytest.mark.parametrize(
    "settings", [{"rank": 0}, {"rank": 2, "alpha": 0}, {"rank": 2, "targets": []}, {"rank": 2, "dropout": 0.1}, {}]
)
def test_a_table_that_makes_no_sense_is_refused(settings: Any) -> None:
    with pytest.raises(RecipeError, match=r"model\.lora"):
        load_recipe({"model": {"path": "world:chain/rich", "lora": settings}, "stages": ["sft"]})


def test_flags_set_the_fields_of_the_table() -> None:
    flags = {"model.lora.rank": "8", "model.lora.targets": '["q_proj"]', "model.lora.alpha": "4"}
    found = load_recipe({"model": {"path": "world:chain/rich"}, "stages": ["sft"]}, flags).model.lora
    assert found is not None and (found.rank, found.alpha, found.targets) == (8, 4, ["q_proj"])
    assert load_recipe(load_recipe({"model": {"path": "m", "lora": {"rank": 1}}, "stages": ["sft"]}).resolved())


def test_auto_counts_the_moments_of_adapters_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks: Any = TwoRanks()
    found = []
    for table in ({}, {"lora": {"rank": 1}}):
        recipe = load_recipe({"model": {"path": "world:chain/rich", **table}, "stages": ["sft"]})
        trained = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(str(WORLD())).parameters())
        monkeypatch.setattr("thence.pipeline.layout.memory_of", lambda device, n=trained: 4 * n * 2 / 0.6)
        found.append(layout_of(recipe, "sft", recipe.model, ranks, torch.device("cpu")))
    assert found == ["fsdp2", "ddp"]


def WORLD() -> str:
    from thence.train.model_files import resolve

    return resolve("world:chain/rich")


class TwoRanks:
    rank, world = 0, 2

    def gather(self, value: Any) -> list[Any]:
        return [value, value]

"""Runs that train adapters over weights in 4 bits: what is sampled, published, resumed and merged is one policy.

What computes in 4 bits needs bitsandbytes (``pip install "thence[qlora]"``), and skips without it.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import thence.pipeline.rl_update as rl_update
from tests.pipeline.on_ranks import case, drive, largest_difference, lines
from tests.recipes import Recipes
from tests.runs import weights
from thence.cli import main
from thence.data.order import stable_seed
from thence.errors import CheckpointError, RecipeError, UserError
from thence.pipeline.adapters import check_lora, check_same_base
from thence.pipeline.layout import layout_of
from thence.pipeline.run import run
from thence.recipe import load_recipe
from thence.train.adapted import merge_checkpoint
from thence.train.lora import add_adapters, places_of
from thence.train.model import load_model
from thence.train.quantized import load_bitsandbytes, quantize, quantized_digest

QLORA = {"rank": 2, "quantize": "nf4"}
SFT = {"lr": 1e-2, "batch": 3, "steps": 4, "checkpoint_every": 1}
GRPO = {"method": "grpo", "mini_batch": 2, "lr": 1e-2}


@pytest.fixture(scope="module")
def bitsandbytes() -> Any:
    try:
        return load_bitsandbytes()
    except UserError:
        pytest.skip('set up an environment with bitsandbytes: pip install "thence[qlora]"')


def qlora(base: dict[str, Any], parallel: str = "auto", **lora: Any) -> dict[str, Any]:
    model = {**base["model"], "compute_dtype": "float32", "lora": {**QLORA, **lora}}
    return {**base, "parallel": parallel, "model": model}


@pytest.fixture(scope="module")
def runs(bitsandbytes: Any, base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qlora")
    sft = {**qlora(base), "stages": ["sft"], "sft": SFT}
    cases = [case(sft, folder / "sft", 1, {}), case({**sft, "parallel": "ddp"}, folder / "sft-ddp", 2, {})]
    cases += [case(qlora(base), folder / "grpo", 1, GRPO), case(qlora(base), folder / "grpo-ddp", 2, GRPO)]
    plain = {**sft, "model": {**sft["model"], "lora": {"rank": 2}}}
    cases += [case(plain, folder / "plain", 1, {})]
    cases += [case(sft, folder / "again", 1, {}, stop=2), case(sft, folder / "again", 1, {}, suffix="-on")]
    beside = {**sft, "sft": {**SFT, "checkpoint_async": True}}
    cases += [case(beside, folder / "beside", 1, {}, stop=2), case(beside, folder / "beside", 1, {}, suffix="-on")]
    drive(folder, cases)
    return folder


def base_in_4_bits(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    """The weights under the adapters of a run, quantized here."""
    recipe = load_recipe(folder / "recipe.toml")
    model = load_model(recipe.model, torch.device("cpu"), recipe.seed).model
    assert recipe.model.lora is not None
    add_adapters(model, recipe.model.lora, stable_seed(recipe.seed, stage))
    quantize(model)
    return {f"{n}.weight": layer.base_layer.dequantized() for n, layer in places_of(model).adapted.items()}


@pytest.mark.parametrize(("name", "stage"), [("sft", "sft"), ("grpo", "rl")])
def test_the_published_model_is_the_quantized_one_with_its_adapters(name: str, stage: str, runs: Path) -> None:
    published, under = weights(runs / name, stage), base_in_4_bits(runs / name, stage)
    (checkpoint,) = (runs / name / "stages" / stage / "checkpoints").glob("step-*")
    adapters = load_file(checkpoint / "model.safetensors")
    assert adapters and all(".lora_" in key for key in adapters)
    assert set(under) < set(published)
    for key, weight in under.items():
        a, b = (adapters[key.replace("weight", f"lora_{x}.default.weight")] for x in "AB")
        assert b.abs().max() > 0
        assert torch.equal(published[key], weight + 2.0 * (b @ a))  # alpha is twice the rank


def test_no_adapter_is_published_that_belongs_to_no_model_at_hand(runs: Path) -> None:
    assert (runs / "sft" / "stages" / "sft" / "model").is_dir()
    assert not (runs / "sft" / "stages" / "sft" / "adapter").exists()


@pytest.mark.parametrize("again", ["again", "beside"])
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bits(again: str, runs: Path) -> None:
    found, expected = weights(runs / again, "sft"), weights(runs / "sft", "sft")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [line["loss"] for line in lines(runs / again)] == [line["loss"] for line in lines(runs / "sft")]


@pytest.mark.parametrize(("name", "stage"), [("sft", "sft"), ("grpo", "rl")])
def test_two_ranks_with_whole_copies_train_the_adapters_of_one(name: str, stage: str, runs: Path) -> None:
    assert len(lines(runs / f"{name}-ddp")) == 4
    assert largest_difference(runs / f"{name}-ddp", runs / name, stage) < 1e-4


def test_flops_count_every_number_of_the_model(runs: Path) -> None:
    found, expected = lines(runs / "sft"), lines(runs / "plain")
    assert expected[0]["flops"] > 0 and len(found) == len(expected)
    for key in ("flops", "executed_flops"):
        assert [line[key] for line in found] == [line[key] for line in expected]
    assert [line["loss"] for line in found] != [line["loss"] for line in expected]


def test_a_checkpoint_is_merged_into_what_it_was_trained_over(runs: Path, tmp_path: Path) -> None:
    (checkpoint,) = (runs / "sft" / "stages" / "sft" / "checkpoints").glob("step-*")
    merge_checkpoint(checkpoint, tmp_path / "merged")
    found, expected = load_file(tmp_path / "merged" / "model.safetensors"), weights(runs / "sft", "sft")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_checkpoint_over_other_bits_is_neither_resumed_nor_merged(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs / "again", tmp_path / "run")
    stage = tmp_path / "run" / "stages" / "sft"
    (stage / "done.json").unlink()
    (checkpoint,) = (stage / "checkpoints").glob("step-*")
    assert json.loads((checkpoint / "state.json").read_text())["quantized"]
    monkeypatch.setattr("thence.train.quantized.BLOCK", 32)  # as another version might
    with pytest.raises(CheckpointError, match="other quantized weights"):
        merge_checkpoint(checkpoint, tmp_path / "merged")
    recipe = load_recipe(tmp_path / "run" / "recipe.toml")
    with pytest.raises(CheckpointError, match="other quantized weights"):
        run(recipe.model_copy(update={"folder": str(tmp_path / "run")}))


def test_the_sampler_samples_from_what_is_trained(
    bitsandbytes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[float] = []
    take = rl_update.Update.take

    def heard(update: Any, trajectories: Any, metrics: Any) -> None:
        rows = [rl_update.bare_row(t) for t in trajectories]
        scored = update.trainer.statistics(rows, update.stage.temperature)
        for trajectory, (trained, _) in zip(trajectories, scored, strict=True):
            apart = trained.double() - torch.tensor(trajectory.sampler_logps, dtype=torch.float64)
            found.append(float(apart.abs().max()))
        take(update, trajectories, metrics)

    monkeypatch.setattr(rl_update.Update, "take", heard)
    run(Recipes(tmp_path)(["rl"], rl={"steps": 3, "lr": 0.1}, model={"lora": {**QLORA, "rank": 4}}))
    assert len(found) > 8 and max(found) < 1e-4


def test_ranks_with_other_bits_are_told() -> None:
    ranks: Any = SimpleNamespace(gather=lambda digest: [digest, "other"])
    with pytest.raises(UserError, match="different bits"):
        check_same_base(ranks, torch.nn.Linear(2, 2))
    assert quantized_digest(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("stages", "settings", "said"),
    [
        (["sft"], {"parallel": "fsdp2"}, "cannot be cut"),
        (["sft", "rl"], {}, "rl would quantize anew what sft has left"),
        (["sft"], {"model": {"compute_dtype": "float64", "lora": QLORA}}, "keeps them in float64"),
        (["sft"], {"sft": {"fault": "sum-of-means"}}, "faults are defined on the weights"),
    ],
)
def test_what_nobody_has_verified_is_refused_before_the_first_step(
    stages: list[str], settings: Any, said: str, tmp_path: Path
) -> None:
    recipe = Recipes(tmp_path)(stages, **{"model": {"lora": QLORA}, **settings})
    with pytest.raises(RecipeError, match=said):
        run(recipe)
    assert not (tmp_path / "run" / "stages").exists()


@pytest.mark.parametrize(
    ("settings", "said", "field"),
    [
        ({"parallel": "fsdp2"}, "cannot be cut", "parallel"),
        ({"parallel": "hsdp", "sharding": {"replicas": 2}}, "cannot be cut", "parallel"),
        ({"sharding": {"context": 2}, "sft": {"packing": True}}, "share rows", "sharding.context"),
    ],
)
def test_layouts_that_nobody_has_verified_are_refused_on_any_number_of_ranks(
    settings: Any, said: str, field: str, tmp_path: Path
) -> None:
    for lora in (QLORA, {"rank": 2}):
        recipe = load_recipe(Recipes(tmp_path)(["sft"], **{"model": {"lora": lora}, **settings}))
        if lora is not QLORA:
            check_lora(recipe, "sft")
            continue
        with pytest.raises(RecipeError, match=said) as refused:
            check_lora(recipe, "sft")
        assert refused.value.field == field


def test_without_bitsandbytes_a_run_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"thence\[qlora\]"):
        run(Recipes(tmp_path)(["sft"], model={"lora": QLORA}))
    assert not (tmp_path / "run" / "stages").exists()


def test_auto_never_cuts_weights_in_4_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thence.pipeline.layout.memory_of", lambda device: 1.0)
    ranks: Any = SimpleNamespace(world=2, rank=0, gather=lambda kind: [kind])
    for lora, expected in ((QLORA, "ddp"), ({"rank": 2}, "fsdp2")):
        recipe = load_recipe(Recipes(tmp_path)(["sft"], model={"lora": lora}))
        assert layout_of(recipe, "sft", recipe.model, ranks, torch.device("cpu")) == expected


def test_a_dry_run_counts_weights_in_4_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model.lora.rank", "4", "--stages", '["sft"]', "--dry-run"]
    main(["run", "quickstart", *flags])
    assert "weights in 4 bits" not in capsys.readouterr().out
    main(["run", "quickstart", *flags, "--model.lora.quantize", "nf4"])
    assert "weights in 4 bits" in capsys.readouterr().out

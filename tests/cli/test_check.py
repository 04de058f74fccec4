"""``thence check``, and the same checks inside a run: what does not hold is said before the first step."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BloomForCausalLM

from thence.cli import main
from thence.errors import UserError
from thence.pipeline import promises
from thence.pipeline.run import run
from thence.recipe import Model
from thence.train import lora, probe
from thence.train.model import load_tokenizer, save_model


@pytest.fixture(scope="module")
def bloom(tmp_path_factory):
    """A model whose rows cannot be packed (ALiBi)."""
    folder = tmp_path_factory.mktemp("bloom")
    tokenizer = load_tokenizer(Model(path="world:chain/rich"))
    torch.manual_seed(0)
    config = AutoConfig.for_model("bloom", vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)
    save_model(AutoModelForCausalLM.from_config(config), tokenizer, folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_tried_before(monkeypatch):
    monkeypatch.setattr(promises, "_tried", set())
    monkeypatch.setenv("COLUMNS", "300")


def recipe_of(model, **sft):
    return {
        "stages": ["sft"],
        "model": {"path": str(model)},
        "data": {"limit": 8},
        "sft": {"steps": 1, "batch": 4, **sft},
    }


def test_a_verdict_for_every_promise_and_the_example_with_what_is_trained(capsys):
    assert main(["check", "world:chain/rich", "--data", "world:chain", "--data.limit", "20", "--sft.packing"]) == 0
    said = capsys.readouterr().out
    for part in (
        "model",
        "end tokens",
        "context",
        "gradient, padded rows",
        "gradient, packed rows",
        "sampling",
        "saving",
    ):
        assert f"✓ {part}" in said
    assert "the longest of 20 rows" in said
    assert "✗" not in said


def test_what_does_not_hold_ends_with_code_1_and_names_a_remedy(bloom, capsys):
    assert main(["check", str(bloom)]) == 0  # packing is a choice
    assert "– packed rows" in capsys.readouterr().out
    assert main(["check", str(bloom), "--sft.packing"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "✗ packed rows" in said
    assert "remedy: set packing = false" in said
    assert "1 do not hold: packed rows" in said


def test_a_bad_row_is_named_with_its_line(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1#1", "mood": "good"}]
    rows.write_text(json.dumps({"messages": turns}))
    assert main(["check", "world:chain/rich", "--data", str(rows)]) == 1
    said = "".join(capsys.readouterr().out.split())
    assert "rows.jsonl:1:messages[1].mood" in said


def test_a_recipe_is_tried_with_all_that_it_names(tmp_path, capsys):
    file = tmp_path / "mine.toml"
    file.write_text(
        'stages = ["sft", "rl"]\n[model]\npath = "world:chain/rich"\n[data]\nlimit = 8\n[rl]\nreward = "mth"\n'
    )
    assert main(["check", str(file)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "✗ rl: reward mth" in said
    assert "✓ gradient, padded rows" in said


def test_a_run_refuses_before_the_first_step_what_its_model_cannot(bloom, tmp_path):
    with pytest.raises(UserError, match="cannot be packed"):
        run(recipe_of(bloom, packing=True), {"folder": str(tmp_path / "run")})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    run(recipe_of(bloom), {"folder": str(tmp_path / "run"), "sft.packing": False}, restart=True)


def test_a_run_whose_last_stage_could_not_sample_does_not_begin(bloom, tmp_path, monkeypatch):
    def refused(model):
        raise UserError("thence cannot sample from it", remedy="use it for SFT only")

    monkeypatch.setattr(promises, "choice_of", refused)
    tables = recipe_of(bloom) | {"stages": ["sft", "eval"], "eval": {"reward": "exact"}}
    with pytest.raises(UserError, match="cannot sample"):
        run(tables, {"folder": str(tmp_path / "run")})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    run(recipe_of(bloom), {"folder": str(tmp_path / "sft alone")})


def test_what_there_is_no_room_to_try_is_said_and_not_passed(bloom, tmp_path, monkeypatch, caplog, capsys):
    def full(size, device):
        raise probe.NotVerified("99.0 GB of memory would be needed for it, 1.0 GB are free")

    monkeypatch.setattr(probe, "need_memory", full)
    run(recipe_of(bloom), {"folder": str(tmp_path / "run")})
    assert "not verified: gradient, padded rows: 99.0 GB" in caplog.text
    assert "not verified: saving and resuming" in caplog.text
    assert main(["check", str(bloom)]) == 0
    said = capsys.readouterr().out
    assert "? gradient, padded rows" in said
    assert "not verified" in said


def test_a_shipped_recipe_holds(capsys):
    """Its data are set in its stages, so the example and the longest row are theirs."""
    assert main(["check", "quickstart"]) == 0
    said = capsys.readouterr().out
    assert "✓ sft: data" in said
    assert "✓ example" in said


def test_another_model_at_the_same_place_is_tried_anew(bloom, tmp_path):
    """Runs of one process try a model once, but not where its folder holds another one by then."""
    place = tmp_path / "model"
    tokenizer = load_tokenizer(Model(path="world:chain/rich"))
    small = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    save_model(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **small)), tokenizer, place)
    run(recipe_of(place), {"folder": str(tmp_path / "first")})
    tried = set(promises._tried)
    save_model(AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **small)), tokenizer, place)
    run(recipe_of(place), {"folder": str(tmp_path / "second")})
    assert len(promises._tried) == 2 * len(tried)


def test_adapters_are_tried_as_a_run_tries_them(tmp_path, monkeypatch, capsys):
    asked = ["check", "world:chain/rich", "--model.lora.rank", "2", "--sft.packing", "--sft.activation-checkpointing"]
    assert main([*asked, "2"]) == 0
    said = capsys.readouterr().out
    assert "parameters are trained, those under them are not" in said
    for part in ("adapters", "gradient, padded rows", "gradient, packed rows", "activation checkpointing", "sampling"):
        assert f"✓ {part}" in said
    file = tmp_path / "mine.toml"
    file.write_text('stages = ["sft"]\n[model]\npath = "world:chain/rich"\nlora = { rank = 2 }\n[data]\nlimit = 8\n')
    monkeypatch.setattr(lora.Merge, "into", lambda self, weight, whole: weight)  # the adapters are not merged
    assert main(["check", str(file)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "✗ gradient, padded rows" in said and "reads a weight past its adapter" in said
    assert main(["check", "world:chain/rich", "--model.lora.rank", "2", "--model.lora.targets", "lm_head"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "✗ adapters" in said and "lm_head" in said and "gradient" not in said


def test_layers_that_cannot_be_recomputed_are_refused_before_the_first_step(bloom, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(BloomForCausalLM, "supports_gradient_checkpointing", False)
    assert main(["check", str(bloom), "--sft.activation-checkpointing"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "✗ activation checkpointing" in said and "activation_checkpointing = false" in said
    later = {"stages": ["sft", "sft-b"], "sft-b": {"activation_checkpointing": 2}}
    with pytest.raises(UserError, match="cannot be recomputed"):
        run(recipe_of(bloom) | later, {"folder": str(tmp_path / "run")})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("base", ["rich", "poor"])
def test_the_recipes_that_pretrain_the_bases_hold(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fewer = ["--data.limit", "160", "--sft-pretrain.steps", "2", "--sft-pretrain.held_out", "20"]
    assert main(["check", f"base-{base}", *fewer]) == 0, capsys.readouterr().out

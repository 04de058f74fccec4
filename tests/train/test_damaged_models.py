"""A model or checkpoint of thence that is no longer as it was written is refused by name, wherever it is opened."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import thence.pipeline.run as running
import thence.train.checkpoint as checkpoint
from tests.recipes import Tables, changed, file_recipe
from tests.runs import stop_in_rl
from tests.train.writing import write as write_step
from thence.cli import main
from thence.errors import UserError
from thence.evaluate.native_backend import NativeBackend
from thence.evaluate.origin import find_model
from thence.pipeline.run import run
from thence.recipe import Model
from thence.train.checkpoint import newest_checkpoint
from thence.train.model import load_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """A run of SFT, an evaluation and RL that was stopped as RL began."""
    recipe = changed(file_recipe(tmp_path_factory.mktemp("kept")), {"stages": ["sft", "eval", "rl"]})
    with pytest.MonkeyPatch.context() as patch:
        stop_in_rl(recipe, patch)
    return recipe


@pytest.fixture
def recipe(kept: Tables, tmp_path: Path) -> Tables:
    """Its recipe, in a folder of its own."""
    shutil.copytree(kept["folder"], tmp_path / "run")
    return {**kept, "folder": str(tmp_path / "run")}


def model_of(recipe: Tables, stage: str = "sft") -> Path:
    return Path(recipe["folder"]) / "stages" / stage / "model"


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1 if file.suffix == ".safetensors" else len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def matching_manifest(model: Path) -> None:
    """Damage a file and write a manifest that fits it: the stage has kept what its own was."""
    flip(model / "model.safetensors")
    checkpoint.publish(model, model.with_name("other"))
    model.with_name("other").rename(model)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (lambda model: flip(model / "model.safetensors"), "model.safetensors"),
    "a cut file": (lambda m: (m / "model.safetensors").write_bytes(b"half"), "model.safetensors"),
    "a file that is gone": (lambda model: (model / "tokenizer.json").unlink(), "tokenizer.json"),
    "another configuration": (lambda model: flip(model / "config.json"), "config.json"),
    "no manifest": (lambda model: (model / "manifest.json").unlink(), "manifest.json"),
    "an empty manifest": (lambda model: (model / "manifest.json").write_text("{}"), "manifest.json"),
    "a damaged manifest": (lambda model: flip(model / "manifest.json"), "man"),
    "a cut manifest": (lambda m: (m / "manifest.json").write_bytes((m / "manifest.json").read_bytes()[:150]), "manif"),
    "a manifest of another model": (matching_manifest, "manifest.json"),
}


def by_run(recipe: Tables) -> object:
    return run(recipe)


def by_another_run(recipe: Tables) -> object:
    own = {"folder": recipe["folder"] + "-2", "stages": ["sft"], "model": {"path": str(model_of(recipe))}}
    return run({**recipe, **own})


def by_eval(recipe: Tables) -> object:
    return NativeBackend(find_model(f"{recipe['folder']}:sft")[0])


def by_load(recipe: Tables) -> object:
    return load_model(Model(path=str(model_of(recipe))), CPU)


OPENED = (by_run, by_another_run, by_eval, by_load)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("opened", OPENED, ids=lambda f: f.__name__)
def test_a_damaged_model_is_refused_wherever_it_is_opened(recipe: Tables, damage: str, opened: Any) -> None:
    act, file = DAMAGE[damage]
    act(model_of(recipe))
    with pytest.raises(UserError) as error:
        opened(recipe)
    assert f"stages/sft/model/{file}" in str(error.value)
    assert "repeat the stage" in error.value.remedy
    assert not (Path(recipe["folder"] + "-2") / "stages").exists()


def test_check_says_it(recipe: Tables, capsys: pytest.CaptureFixture[str]) -> None:
    flip(model_of(recipe) / "model.safetensors")
    assert main(["check", recipe["folder"]]) == 1
    said = "".join(capsys.readouterr().out.split())
    assert "stages/sft/model/model.safetensors" in said and "--repeatsft" in said


def test_a_model_that_was_copied_elsewhere_is_known_by_its_manifest(recipe: Tables, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_of(recipe), copy)
    load_model(Model(path=str(copy)), CPU)
    flip(copy / "model.safetensors")
    with pytest.raises(UserError, match=r"copy/model\.safetensors"):
        load_model(Model(path=str(copy)), CPU)
    (copy / "manifest.json").unlink()  # the remedy for a model that was changed on purpose
    load_model(Model(path=str(copy)), CPU)


def test_a_manifest_of_other_programs_says_nothing(recipe: Tables, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_of(recipe), copy)
    for text in ('{"version": 3}', "[1]", "not JSON", '{"config.json": "sha1"}'):
        (copy / "manifest.json").write_text(text)
        assert load_model(Model(path=str(copy)), CPU) is not None


def test_the_remedy_works_and_what_was_built_on_the_model_stands(recipe: Tables, capsys: Any) -> None:
    run(recipe)
    before = {stage: (model_of(recipe, stage) / "model.safetensors").read_bytes() for stage in ("sft", "rl")}
    grounds = (Path(recipe["folder"]) / "stages" / "rl" / "ground.json").read_text()
    flip(model_of(recipe) / "model.safetensors")
    with pytest.raises(UserError) as error:
        by_eval(recipe)
    command = error.value.remedy.split("set aside: ")[-1] if "set aside: " in error.value.remedy else error.value.remedy
    command = command.split("aside: ")[-1].split(";")[0]
    assert main(shlex.split(command)[1:]) == 0
    assert {stage: (model_of(recipe, stage) / "model.safetensors").read_bytes() for stage in ("sft", "rl")} == before
    assert (Path(recipe["folder"]) / "stages" / "rl" / "ground.json").read_text() == grounds, "it was not run again"
    aside = Path(recipe["folder"]) / "set-aside" / "sft-1"
    assert (aside / "model" / "model.safetensors").exists()
    assert json.loads((aside / "metrics.jsonl").read_text())["stage"] == "sft"
    lines = [json.loads(line) for line in (Path(recipe["folder"]) / "metrics.jsonl").read_text().splitlines()]
    assert sorted((line["stage"], line["step"]) for line in lines) == [("rl", 1), ("sft", 1)]
    by_eval(recipe)


def test_a_stage_that_started_from_another_model_than_the_repeated_one_is_repeated_too(
    recipe: Tables, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(recipe)
    before = (model_of(recipe, "rl") / "model.safetensors").read_bytes()
    original = running.publish_model

    def other(context: Any, stage: Any) -> None:
        if context.name == "sft":
            with torch.no_grad():
                next(context.model.parameters()).add_(1e-3)
        original(context, stage)

    monkeypatch.setattr(running, "publish_model", other)
    run(recipe, repeat=["sft"])
    assert "stage rl: the stage before it was repeated and has left another model" in caplog.text
    assert (model_of(recipe, "rl") / "model.safetensors").read_bytes() != before
    folder = Path(recipe["folder"])
    assert {path.name for path in (folder / "set-aside").iterdir()} == {"sft-1", "eval-1", "rl-1"}
    assert (folder / "set-aside" / "rl-1" / "model" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("argv", [["--repeat", "nothing"], ["--repeat"], ["--repeat", "sft", "--restart"]])
def test_a_stage_that_is_not_there_cannot_be_repeated(recipe: Tables, argv: list[str]) -> None:
    assert main(["run", f"{recipe['folder']}/recipe.toml", "--folder", recipe["folder"], *argv]) == 2


def test_a_model_is_summed_once_while_it_does_not_change(recipe: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    summed: list[Path] = []
    original = checkpoint._sha256
    monkeypatch.setattr(checkpoint, "_sha256", lambda path: summed.append(path) or original(path))
    by_load(recipe)
    first = len(summed)
    by_load(recipe)
    assert first == len(summed) == len(set(summed)) > 0


def test_a_checkpoint_that_is_passed_over_is_named_with_the_one_that_is_taken(
    tiny_model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(torch.float32)
    write_step(tmp_path, 10, model, keep=2)
    flip(write_step(tmp_path, 20, model, keep=2) / "optimizer.safetensors")
    with caplog.at_level(logging.WARNING):
        found = newest_checkpoint(tmp_path)
    assert found is not None and found.step == 10
    assert "the checkpoint of step 20 is damaged" in caplog.text
    assert "step-000020/optimizer.safetensors" in caplog.text and "that of step 10 is taken" in caplog.text


def test_a_stage_without_a_whole_checkpoint_says_that_it_begins_anew(
    tiny_model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flip(write_step(tmp_path, 20, tiny_model(torch.float32)) / "model.safetensors")
    assert newest_checkpoint(tmp_path) is None
    assert "the checkpoint of step 20 is damaged" in caplog.text and "from step 0" in caplog.text

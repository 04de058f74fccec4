"""Files of a run that are damaged: refused with their place and a remedy that works, never overwritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.damage import damaged, harm, refused, sampled
from tests.recipes import Recipes, changed, file_recipe
from tests.runs import metrics, weights
from thence.cli import main
from thence.compare.summary import read_summary, summarise
from thence.errors import DamagedFile, UserError
from thence.pages.run.page import write_page
from thence.pipeline.run import run
from thence.pipeline.undo import rewind
from thence.train.model import load_model


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], Path]:
    """A run whose evaluation has still to be done, over a trained stage."""
    made = Recipes(tmp_path_factory.mktemp("finished"))
    recipe = made(["sft", "eval"], eval={"reward_right_from": 0.1})
    return recipe, run(recipe)


@pytest.fixture
def one(finished: tuple[dict[str, Any], Path], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A copy of the finished run, and its recipe."""
    recipe, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    return {**recipe, "folder": str(tmp_path / "run")}, tmp_path / "run"


def reopened(folder: Path) -> None:
    """The evaluation is not done yet, but its measurements are kept."""
    (folder / "stages" / "eval" / "done.json").unlink()


OF_A_RUN = (
    "environment.json",
    "ground.json",
    "stages/sft/ground.json",
    "stages/sft/done.json",
    "stages/eval/ground.json",
    "stages/eval/done.json",
    "stages/eval/evaluation/evaluation.toml",
    "stages/eval/evaluation/environment.json",
)


@sampled
@damaged
@pytest.mark.parametrize("name", OF_A_RUN)
def test_a_run_refuses_its_damaged_files_and_the_remedy_works(
    one: tuple[dict[str, Any], Path], name: str, kind: str
) -> None:
    recipe, folder = one
    if name != "stages/eval/done.json":
        reopened(folder)
    harm(folder / name, kind)
    error = refused(lambda: run(recipe), folder / name, kind)
    assert "rename" in error.remedy
    if kind in ("cut", "number"):  # the remedy is the same for all kinds
        before = weights(folder, "sft")
        moved = folder / name
        if "evaluation" in moved.parts:  # a store is measured again as a whole
            moved = moved.parent
        assert str(moved) in error.remedy or "rename it" in error.remedy
        moved.rename(moved.with_name(f"{moved.name}.aside"))
        run(recipe)
        assert (folder / "stages" / "eval" / "result.json").exists()
        assert all(value.equal(before[key]) for key, value in weights(folder, "sft").items())


@pytest.mark.parametrize("lines", ["samples", "grades"])
def test_damaged_lines_of_a_runs_evaluation_are_made_again(one: tuple[dict[str, Any], Path], lines: str) -> None:
    recipe, folder = one
    reopened(folder)
    stage = folder / "stages" / "eval"
    before = {name: (stage / name).read_bytes() for name in ("samples.jsonl", "result.json")}
    (file,) = (stage / "evaluation" / lines).glob("*.jsonl")
    file.write_bytes(b'{"problem": 3}\n' + file.read_bytes().split(b"\n", 1)[1])
    run(recipe)
    assert {name: (stage / name).read_bytes() for name in before} == before
    assert file.with_name(f"{file.name}.damaged").read_bytes() == b'{"problem": 3}\n'


def test_a_changed_note_of_a_model_does_not_set_aside_the_stage_that_was_trained_on_it(tmp_path: Path) -> None:
    recipe = changed(file_recipe(tmp_path), {"stages": ["sft", "rl"], "rl.steps": 1})
    folder = run(recipe)
    done = folder / "stages" / "sft" / "done.json"
    noted = json.loads(done.read_text())["model"]
    done.write_text(done.read_text().replace(noted, f"{int(noted, 16) ^ 1:016x}"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(DamagedFile) as refused:
        run(recipe)
    assert refused.value.file == str(done)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


@sampled
@damaged
def test_a_damaged_recipe_in_a_run_folder_is_refused(one: tuple[dict[str, Any], Path], kind: str) -> None:
    recipe, folder = one
    content = harm(folder / "recipe.toml", kind)
    with pytest.raises(UserError, match="is not as thence wrote it") as caught:
        run(recipe)
    assert caught.value.file == str(folder / "recipe.toml")
    assert (folder / "recipe.toml").read_bytes() == content


@sampled
@damaged
@pytest.mark.parametrize("name", ["manifest.json", "config.json", "generation_config.json", "tokenizer.json"])
def test_a_damaged_file_of_a_written_model_is_refused(one: tuple[dict[str, Any], Path], name: str, kind: str) -> None:
    recipe, folder = one
    reopened(folder)
    content = harm(folder / "stages" / "sft" / "model" / name, kind)
    with pytest.raises(UserError):
        run(recipe)
    assert (folder / "stages" / "sft" / "model" / name).read_bytes() == content


@sampled
@damaged
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_with_a_damaged_file_is_opened_with_an_error_for_the_user(
    one: tuple[dict[str, Any], Path], name: str, kind: str
) -> None:
    import torch

    from thence.recipe import Model

    _, folder = one
    model = folder / "stages" / "sft" / "model"
    harm(model / name, kind)
    with pytest.raises(UserError) as caught:
        load_model(Model(path=str(model)), torch.device("cpu"))
    assert str(model) in str(caught.value)
    assert name != "config.json" or kind == "object" or caught.value.file == str(model / name)


@sampled
@damaged
def test_every_report_of_a_damaged_run_is_written_and_says_so(one: tuple[dict[str, Any], Path], kind: str) -> None:
    _, folder = one
    for name in ("recipe.toml", "environment.json", "metrics.jsonl", "stages/eval/result.json"):
        harm(folder / name, kind)
    harm(folder / "stages" / "eval" / "samples.jsonl", kind)
    assert "cannot be read" in write_page(folder).read_text() or kind in ("object", "emptied")


BAD_LINES = {
    "not JSON": b'{"stage": "sft", "st',
    "not UTF-8": b'{"stage": "sft", "step": 1, "x": "\xff"}',
    "object": b"{}",
    "number": b"3",
    "list": b"[1]",
    "step of text": b'{"stage": "sft", "step": "1"}',
    "step of bool": b'{"stage": "sft", "step": true}',
    "stage of number": b'{"stage": 1, "step": 1}',
    "conflict": b"<<<<<<< HEAD",
    "nested": b"[" * 100_000,
    "two in one": b'{"stage": "sft", "step": 1}{"stage": "sft", "step": 2}',
}


@sampled
@pytest.mark.parametrize("place", [0, 4, 7])
@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_damaged_line_costs_itself_alone_on_resume(
    recipes: Recipes,
    kind: str,
    place: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = Path(recipes([])["folder"])
    folder.mkdir(parents=True)
    lines = [json.dumps({"stage": "sft", "step": step, "loss": 1 / step}).encode() for step in range(1, 9)]
    lines[place] = BAD_LINES[kind]
    (folder / "metrics.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    rewind(folder, "sft", 8)
    assert [line["step"] for line in metrics(folder)] == [s for s in range(1, 9) if s != place + 1]
    assert (folder / "metrics.jsonl.damaged").read_bytes() == BAD_LINES[kind] + b"\n"
    assert f"{folder / 'metrics.jsonl'}:{place + 1}" in caplog.text
    assert "1 damaged line set aside" in write_page(folder).read_text()


def test_a_run_with_a_damaged_first_line_goes_on(
    recipes: Recipes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import thence.pipeline.run as running

    recipe = recipes(["sft"], sft={"checkpoint_every": 1, "steps": 3})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(running, "publish_model", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        run(recipe)
    file = Path(recipe["folder"]) / "metrics.jsonl"
    file.write_bytes(b"{}\n" + file.read_bytes().split(b"\n", 1)[1])
    assert [line["step"] for line in metrics(run(recipe))] == [2, 3]


def test_samples_are_shown_though_lines_are_damaged(
    one: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    _, folder = one
    file = folder / "stages" / "eval" / "samples.jsonl"
    file.write_bytes(b"{}\n3\n\xff\n" + file.read_bytes())
    assert main(["sample", str(folder)]) == 0
    assert all(f"{file}:{line}" in caplog.text for line in (1, 2, 3))


@sampled
@damaged
def test_a_damaged_summary_is_refused_and_made_again_once_renamed(one: tuple[dict[str, Any], Path], kind: str) -> None:
    _, folder = one
    whole = summarise(folder)
    harm(folder / "summary.json", kind)
    refused(lambda: read_summary(folder), folder / "summary.json", kind)
    (folder / "summary.json").rename(folder / "summary.json.aside")
    assert read_summary(folder) is None and summarise(folder) == whole == read_summary(folder)


@pytest.mark.parametrize("name", ["metrics.jsonl", "stages/eval/samples.jsonl"])
def test_a_summary_is_not_made_of_files_that_lack_lines(one: tuple[dict[str, Any], Path], name: str) -> None:
    _, folder = one
    content = (folder / name).read_bytes()
    for harmed in (b"{}\n" + content.split(b"\n", 1)[1], b"".join(content.splitlines(keepends=True)[:-1])):
        (folder / name).write_bytes(harmed)
        with pytest.raises(DamagedFile) as caught:
            summarise(folder)
        assert caught.value.file == str(folder / name)
    assert not (folder / "summary.json").exists()

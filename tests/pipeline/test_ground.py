"""A run that is resumed on other ground is refused: other data, another model, another reward, another template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import thence.pipeline.prompts as prompts
from tests.recipes import ROWS, Tables, changed, write_rows
from tests.runs import stop_in_rl
from thence.cli import main
from thence.data.trajectory import Prompt
from thence.errors import UserError
from thence.pipeline.folder import RunFolder
from thence.pipeline.ground import Ground
from thence.pipeline.progress import NullWatcher
from thence.pipeline.run import run
from thence.recipe import Model, load_recipe
from thence.toml import to_toml
from thence.train.model import load_model, save_model

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def recipe(tables: Tables, tmp_path: Path) -> Tables:
    """Everything in files: the model too, and a chat template."""
    loaded = load_model(Model(**tables["model"]), torch.device("cpu"))
    save_model(loaded.model, loaded.tokenizer, tmp_path / "base")
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    rows = [{"messages": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in ROWS]
    chat = {"source": [write_rows(tmp_path / "chat.jsonl", rows)], "template": str(tmp_path / "chat.jinja")}
    return changed(
        tables, {"model": {"path": str(tmp_path / "base")}, "rl.data": chat, "stages": ["sft", "eval", "rl"]}
    )


def grow(file: Path) -> None:
    file.write_text(file.read_text() + json.dumps({**ROWS[0], "prompt": "0+1?"}) + "\n")


def other_weights(folder: Path) -> None:
    loaded = load_model(Model(path=str(folder)), torch.device("cpu"))
    with torch.no_grad():
        next(loaded.model.parameters()).add_(1e-3)
    save_model(loaded.model, loaded.tokenizer, folder)


def edit(file: Path, before: str, after: str) -> None:
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


CHANGES: dict[str, tuple[Any, str]] = {
    "training data that grew": (
        lambda at: grow(at / "train.jsonl"),
        "train.jsonl: the file is not the one that stage sft",
    ),
    "an evaluation that grew": (
        lambda at: grow(at / "test.jsonl"),
        "test.jsonl: the file is not the one that stage eval",
    ),
    "other answers": (
        lambda at: edit(at / "chat.jsonl", '"answer": "2"', '"answer": "3"'),
        "chat.jsonl: the file is not the one that stage rl was begun with",
    ),
    "a chat template": (
        lambda at: edit(at / "chat.jinja", "m.content", "m.content | trim"),
        "chat.jinja: the file is not the one that stage rl was begun with",
    ),
    "a reward": (lambda at: edit(at / "own.py", "% 2", "% 3"), "own.py: the file is not the one that stage rl"),
    "a model": (lambda at: other_weights(at / "base"), "model.safetensors: the file is not the one that the run"),
    "a tokenizer": (
        lambda at: edit(at / "base" / "tokenizer_config.json", "{", '{"clean": true,'),
        "tokenizer_config.json: the file is not the one that the run was begun with",
    ),
    "a template put beside the tokenizer": (
        lambda at: (at / "base" / "chat_template.jinja").write_text(TEMPLATE),
        "chat_template.jinja: the file was not there when the run was begun",
    ),
}


@pytest.mark.matrix(4)
@pytest.mark.parametrize("name", CHANGES)
def test_a_run_is_not_resumed_on_changed_ground(
    name: str, recipe: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_in_rl(recipe, monkeypatch)
    change, message = CHANGES[name]
    change(tmp_path)
    with pytest.raises(UserError) as error:
        run(recipe)
    assert message in str(error.value)
    assert "another --folder" in error.value.remedy
    if "then" in error.value.problem:
        assert error.value.problem.count("digest") == 2
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(recipe))
    assert main(["run", str(file), "--dry-run"]) == 2
    assert message in capsys.readouterr().err
    assert run(recipe, restart=True).exists()  # the remedy works


def test_an_untouched_run_is_resumed(recipe: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_in_rl(recipe, monkeypatch)
    for file in tmp_path.glob("*.jsonl"):
        file.write_text(file.read_text())  # written again, with the same content
    folder = run(recipe)
    assert (folder / "stages" / "rl" / "done.json").exists()


def test_one_evaluation_can_be_repeated_alone(recipe: Tables, tmp_path: Path) -> None:
    folder = run(recipe)
    grow(tmp_path / "test.jsonl")
    with pytest.raises(UserError, match=r"to repeat this evaluation alone: thence run .* --repeat eval"):
        run(recipe)
    run(recipe, repeat=["eval"])
    assert json.loads((folder / "set-aside" / "eval-1" / "result.json").read_text())["rows"][0]["problems"] == 3
    rows = json.loads((folder / "stages" / "eval" / "result.json").read_text())["rows"]
    assert rows[0]["problems"] == 4


def test_data_that_are_no_files_are_known_by_their_rows(
    recipe: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(recipe, {"rl.data": {"source": ["world:chain"], "limit": 4}})
    stop_in_rl(recipe, monkeypatch)
    original = prompts.load_prompts
    monkeypatch.setattr(prompts, "load_prompts", lambda data, tokenizer: original(data, tokenizer)[::-1])
    with pytest.raises(UserError, match="the rows of data are not those that stage rl began with"):
        run(recipe)


def test_files_of_finished_stages_that_are_gone_are_said_and_not_needed(
    recipe: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stop_in_rl(recipe, monkeypatch)
    (tmp_path / "test.jsonl").unlink()
    assert run(recipe).exists()
    assert "stage eval has read" in caplog.text


def test_another_environment_is_said_and_not_refused(
    recipe: Tables, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stop_in_rl(recipe, monkeypatch)
    file = Path(recipe["folder"]) / "environment.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "torch": "1.0", "threads": 99, "ranks": 4}))
    run(recipe)
    assert "torch 1.0 -> " in caplog.text
    assert "threads 99 -> " in caplog.text
    assert "ranks 4 -> 1" in caplog.text


def test_a_run_of_an_older_version_without_fingerprints_is_resumed(
    recipe: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_in_rl(recipe, monkeypatch)
    for file in Path(recipe["folder"]).rglob("ground.json"):
        file.unlink()
    folder = run(recipe)
    assert (folder / "stages" / "rl" / "ground.json").exists()


def test_a_run_that_is_resumed_without_the_kernels_says_so(
    recipe: Tables, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same recipe without a C compiler gives other last bits; two logs would then differ without a reason."""
    recipe = changed(recipe, {"stages": ["sft"], "sft.checkpoint_every": 1, "sft.steps": 2})

    class Stop(NullWatcher):
        def step(self, *_: Any) -> None:
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, watcher=Stop())
    monkeypatch.setattr("thence.kernels.build.compiler", lambda: None)
    run(recipe)
    assert "the run began with another environment" in caplog.text
    assert "the checkpoint of step 1 was made with other numerics (kernels C" in caplog.text
    assert "-> torch (no C compiler)" in caplog.text


def test_other_columns_that_a_reward_may_read_are_part_of_the_ground(recipe: Tables, tmp_path: Path) -> None:
    """Of a data set on the hub no file is compared, and prompts and answers alone do not tell."""
    (tmp_path / "own.py").write_text("def share(prompt, response, answer, columns):\n    return 1.0\n")
    own = load_recipe(changed(recipe, {"rl.reward": f"{tmp_path / 'own.py'}:share"}))
    (tmp_path / "run").mkdir()
    ground = Ground(own, RunFolder(tmp_path / "run"))
    first, other = ([Prompt(0, (1, 2), answer="1", columns=text)] for text in ('{"a": 1}', '{"a": 2}'))
    ground.begin("rl", {"rl.data": first})
    ground.begin("rl", {"rl.data": first})
    with pytest.raises(UserError, match=r"rl\.data with their other columns are not those"):
        ground.begin("rl", {"rl.data": other})
    math = Ground(load_recipe(changed(recipe, {"rl.reward": "exact"})), RunFolder(tmp_path / "math"))
    for rows in (first, other):  # which no grader of answers reads
        math.begin("rl", {"rl.data": rows})

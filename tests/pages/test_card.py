"""Model cards: what the run's files say, and hostile text that stays text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

import thence
from tests.recipes import file_recipe
from thence.cli import main
from thence.errors import UserError
from thence.files import to_json
from thence.pages.card import CardSubject, model_card, subject_of_card
from thence.pipeline.run_files import read_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    recipe = file_recipe(folder)
    return thence.run(
        {**recipe, "stages": ["eval", "sft", "rl", "eval-rl"], "sft": {**recipe["sft"], "steps": 2, "keep_every": 1}},
        progress=False,
    ).folder


def front_matter(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


def test_a_card_holds_what_the_files_of_the_run_say(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(finished), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"model card: {tmp_path / 'out' / 'README.md'}" in capsys.readouterr().out
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["thence"],
    }  # no licence, no base: nobody stated one
    run = read_run(finished)
    for training in run.training:
        assert f"| {len(training.steps)} | {training.total('trained_tokens'):,.0f} | " in card
        assert f"{training.total('flops'):.3g} |" in card
    flops = sum(training.total("flops") or 0 for training in run.training)
    assert f"Together {flops:.3g} FLOPs" in card
    (column,) = run.columns
    for subject in ("base", "rl"):
        cell = run.cell(subject, column)
        assert cell is not None
        level = run.level(cell)
        assert f"{level.shown} ({level.interval})" in card
    assert f"thence `{thence.__version__}`" in card and run.recipe_text.rstrip("\n") in card
    assert "the finished model of stage `rl`" in card and "random weights of a `llama`" in card


def test_weights_that_were_not_measured_get_no_evaluation(finished: Path, tmp_path: Path) -> None:
    for name in (f"{finished}:sft", f"{finished}:sft@1"):
        out = tmp_path / name.rpartition(":")[2]
        assert main(["export", name, str(out)]) == 0
        assert "no evaluation of these weights" in (out / "README.md").read_text()
    early = (tmp_path / "sft@1" / "README.md").read_text()
    first = read_run(finished).training[0].steps[0]
    assert "the checkpoint after step 1 of stage `sft`" in early
    assert f"Together {first['flops']:.3g} FLOPs" in early and "`rl`" not in early.split("## Recipe")[0]


def test_a_checkpoint_outside_of_a_run_gets_no_card(finished: Path, tmp_path: Path) -> None:
    assert main(["export", str(finished), str(tmp_path / "one")]) == 0
    (tmp_path / "one" / "README.md").unlink()
    assert main(["export", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert not (tmp_path / "two" / "README.md").exists()
    assert subject_of_card(tmp_path / "stages" / "sft" / "model") is None


HOSTILE = "x`` | [a](http://evil) <script>alert(1)</script>\n---\nlicense: mit\n# `head` ![i](http://evil/i.png)"


def test_hostile_text_stays_text(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "stages").mkdir(parents=True)
    (run / "recipe.toml").write_text(
        f"name = {json.dumps(HOSTILE)}\ndescription = {json.dumps(HOSTILE)}\nstages = ['sft']\n"
        f"[model]\npath = {json.dumps(HOSTILE)}\n[data]\nsource = [{json.dumps(HOSTILE)}]\n"
        "[other]\ntext = '''\n```\n# out of the block\n````\n'''\n"
    )
    (run / "environment.json").write_text(to_json({"thence": HOSTILE, "methods": {"sft": HOSTILE}}))
    card = model_card(CardSubject(run, "sft"), 1, "F32")
    assert set(front_matter(card)) == {"library_name", "pipeline_tag", "tags"}
    markdown = MarkdownIt("gfm-like", {"linkify": False}).enable("table")
    tokens = markdown.parse(card.split("---\n", 2)[2])
    inline = [child for token in tokens for child in token.children or []]
    kinds = {token.type for token in [*tokens, *inline]}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "hr"}
    heads = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert heads[1:] == ["Training", "Evaluation", "Recipe", "Licence"]
    said = [child.content for child in inline if child.type == "code_inline"]
    assert said.count(HOSTILE.replace("\n", "\\n")) == 5  # name, base, version, method, data: as they are


def test_the_home_directory_and_secrets_are_left_out(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(
        f"stages = ['sft']\n[model]\npath = '{tmp_path}/m'\n[data]\nsource = ['https://me:S3cretS3cret@host/x.jsonl']\n"
    )
    card = model_card(CardSubject(run, "sft"), 1, "F32")
    assert str(tmp_path) not in card and "`~/m`" in card and "'~/m'" in card
    assert "S3cret" not in card and "host/x.jsonl" in card


def test_names_of_the_hub_stand_in_the_front_matter_where_the_cache_knows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("models--some--model", "datasets--some--rows"):
        (tmp_path / "cache" / name).mkdir(parents=True)
    (tmp_path / "recipe.toml").write_text(
        "stages = ['sft']\n[model]\npath = 'some/model'\n[data]\nsource = ['some/rows', 'local/rows']\n"
    )
    found = front_matter(model_card(CardSubject(tmp_path, "sft"), 1, "F32"))
    assert found["base_model"] == "some/model" and found["datasets"] == ["some/rows"]
    (tmp_path / "cache" / "models--some--model").rmdir()
    assert "base_model" not in front_matter(model_card(CardSubject(tmp_path, "sft"), 1, "F32"))


def test_a_run_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        model_card(CardSubject(tmp_path / "nowhere", "sft"), 1, "F32")

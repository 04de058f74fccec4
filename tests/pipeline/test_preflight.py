"""What a recipe names is tried before the first step: a run and ``--dry-run`` refuse the same, early, with a remedy."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from tests.recipes import ROWS, Tables, changed, write_rows
from thence.cli import main
from thence.data.worlds.vocabulary import VOCABULARY
from thence.errors import UserError
from thence.models.lengths import context_of
from thence.pipeline import reward_trial
from thence.pipeline.preflight import preflight
from thence.pipeline.run import run
from thence.recipe import load_recipe
from thence.rollout.vllm.wire import TOKEN_VARIABLE
from thence.toml import to_toml

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a mistyped reward": ({"rl.reward": "mth"}, "no reward is called 'mth'"),
    "a reward without its file": ({"rl.reward": "absent.py:share"}, "absent.py:share: there is no file"),
    "a mistyped reward of an evaluation": ({"eval.reward": "exactt"}, "no reward is called"),
    "a missing evaluation file": ({"eval.data": {"source": ["absent.jsonl"]}}, "absent.jsonl: no such file"),
    "a missing RL file": ({"rl.data": {"source": ["absent.jsonl"]}}, "absent.jsonl: no such file"),
    "one missing test set of two": (
        {"eval.splits": {"one": {}, "two": {"source": ["absent.jsonl"]}}},
        "absent.jsonl: no such file",
    ),
    "a key of a stage's data": ({"rl.data": {"limt": 3}}, "did you mean 'limit'"),
    "columns that are not there": ({"rl.data": {"columns": {"prompt": "question"}}}, "question"),
    "no Python for vLLM": ({"rl.engine": "vllm", "rl.vllm": {"python": "/absent/python"}}, "no such Python"),
    "a Python without vLLM": ({"rl.engine": "vllm", "rl.vllm": {"python": "HERE"}}, "cannot import vLLM"),
    "no vLLM server": ({"rl.engine": "vllm", "rl.vllm": {"server": "127.0.0.1:9"}}, "no vLLM server listens"),
    "a setting vLLM does not have": ({"rl.vllm": {"pyhton": "x"}}, "unknown key"),
    "a budget under a schedule": ({"rl.tokens": 100, "rl.schedule": "cosine"}, "the budget of tokens may end it"),
    "everything held out": ({"sft.held_out": 8}, "leaves nothing of 8 examples"),
    "a chat template that is not there": ({"rl.data": {"template": "absent.jinja"}}, "absent.jinja"),
    "a method without room": ({"rl.method": "luffy", "rl.rollouts": 1}, "rl.rollouts"),
    "a folder that is a file": ({"folder": "OCCUPIED"}, "a folder is needed here"),
    "a temperature below zero": ({"eval.temperatures": [-1.0]}, "eval.temperatures"),
    "a test set that is no name": ({"eval.splits": {"a/b": {}}}, "'a/b' cannot name a file"),
    "an explicit response too long": ({"rl.max_tokens": 64}, "exceed the model's context of 64"),
    "an evaluation's response too long": ({"eval.max_tokens": 999}, "exceed the model's context of 64"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_is_refused_before_the_first_step_by_run_and_dry_run(
    name: str,
    tables: Tables,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags, message = WRONG[name]
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    (tmp_path / "file").write_text("")
    text = json.dumps(flags).replace("OCCUPIED", str(tmp_path / "file" / "run")).replace("HERE", sys.executable)
    recipe = changed(tables, json.loads(text))
    with pytest.raises(UserError) as error:
        run(recipe)
    assert message in str(error.value)
    assert "remedy" in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "stages").exists()
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(recipe))
    assert main(["run", str(file), "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_data_without_answers_or_demonstrations_are_refused_where_they_are_needed(
    tables: Tables, tmp_path: Path
) -> None:
    del tables["sft"]
    tables = changed(tables, {"stages": ["rl"]})
    asked = write_rows(tmp_path / "asked.jsonl", [{"question": row["prompt"], "answer": "3"} for row in ROWS])
    with pytest.raises(UserError, match="no example has a demonstration"):
        run(changed(tables, {"rl.method": "luffy", "data.source": [asked]}))
    told = write_rows(tmp_path / "told.jsonl", [{"prompt": r["prompt"], "completion": r["completion"]} for r in ROWS])
    with pytest.raises(UserError, match="no example has an answer"):
        run(changed(tables, {"rl.reward": "exact", "data.source": [told]}))


def test_several_wrong_things_are_all_named(tables: Tables) -> None:
    with pytest.raises(UserError) as error:
        run(changed(tables, {"rl.reward": "mth", "eval.data": {"source": ["absent.jsonl"]}}))
    assert "no reward is called 'mth'" in str(error.value)
    assert "absent.jsonl: no such file" in str(error.value)


def test_an_own_reward_that_fails_is_refused_before_training(tables: Tables, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def reward(prompt, response, answer):\n    return answer['value']\n")
    with pytest.raises(UserError, match=r"raised TypeError"):
        run(changed(tables, {"rl.reward": f"{tmp_path / 'broken.py'}:reward"}))
    assert not (tmp_path / "run").exists()


def test_a_restart_that_is_refused_keeps_the_run_that_it_would_have_replaced(tables: Tables) -> None:
    folder = run(tables)
    with pytest.raises(UserError, match="no reward"):
        run(changed(tables, {"rl.reward": "mth"}), restart=True)
    assert (folder / "stages" / "eval" / "done.json").exists()


def test_a_stage_that_is_done_is_not_tried_again(tables: Tables, tmp_path: Path) -> None:
    run(tables)
    (tmp_path / "own.py").rename(tmp_path / "gone.py")  # RL is over
    findings = preflight(load_recipe(tables))
    names = ["run folder", "files that the run was begun with", "models of finished stages"]
    assert [(finding.part, finding.state) for finding in findings] == [(name, "ok") for name in names]


def test_each_data_table_is_rendered_once_for_the_trial_and_its_stages(
    tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    import thence.pipeline.prompts as prompts

    rendered: list[list[str]] = []
    original = prompts.load_prompts

    def counted(data: Any, tokenizer: Any) -> Any:
        rendered.append(data.source)
        return original(data, tokenizer)

    monkeypatch.setattr(prompts, "load_prompts", counted)
    run(tables)
    assert len(rendered) == 2  # SFT and RL share one


# What is not at hand.


def test_a_dry_run_says_what_it_could_not_verify_and_a_run_refuses(
    tables: Tables, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    recipe = changed(tables, {"model": {"path": "nobody/absent-model"}})
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(recipe))
    assert main(["run", str(file), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "not verified: model: tokenizer: nobody/absent-model is not at hand" in out
    assert "not verified: sft: data: 8 examples were read, but not rendered" in out
    with pytest.raises(UserError, match="cannot open"):
        run(recipe)
    file.write_text(to_toml(changed(recipe, {"data.source": ["absent.jsonl"]})))
    assert main(["run", str(file), "--dry-run"]) == 2  # what can be tried still is


# Lengths.


def remedied(tables: Tables, error: UserError, tmp_path: Path) -> int:
    """Run with the flags that an error's remedy names."""
    words = shlex.split(error.remedy.replace(",", " ").replace("(", " "))
    first = next(i for i, word in enumerate(words) if word.startswith("--"))
    flags = []
    for word in words[first:]:
        if not word.startswith("--") and not word.isdigit():
            break
        flags.append(word)
    assert flags
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(tables))
    return main(["run", str(file), *flags])


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"rl.max_tokens": 64},
            r"the prompt of example 1 has \d+ tokens; with 64 more they exceed the model's context",
        ),
        ({"eval.max_tokens": 60}, "exceed the model's context of 64"),
        ({"data.source": ["LONG"]}, "1 of 9 rows are longer than the model's context of 64 tokens, .*example 9"),
        ({"rl.data": {"source": ["LONG"]}, "rl.max_tokens": 20}, "leaves no room for a response"),
    ],
)
def test_rows_that_do_not_fit_are_refused_with_a_remedy_that_works(
    flags: dict[str, Any], message: str, tables: Tables, tmp_path: Path
) -> None:
    long = {"prompt": "1+1?" * (20 if "rl.data" in flags else 2), "completion": "2" * 70, "answer": "2"}
    path = write_rows(tmp_path / "long.jsonl", [*ROWS, long])
    recipe = changed(tables, json.loads(json.dumps(flags).replace("LONG", path)))
    if "data.source" in flags:
        recipe = changed(recipe, {"stages": ["sft"]})
    with pytest.raises(UserError, match=message) as error:
        run(recipe)
    assert remedied(recipe, error.value, tmp_path) == 0


def test_a_length_that_is_not_set_is_cut_to_what_fits_and_said(
    tables: Tables, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    del tables["eval"]["max_tokens"], tables["rl"]["max_tokens"]
    folder = run(tables)
    longest = max(len(json.loads(line)["response"]) for line in (folder / "stages/eval/samples.jsonl").open())
    assert 0 < longest < 64
    assert "eval: max_tokens is not set and is cut from 8192 to 59" in caplog.text
    # the folder's own recipe does not turn the cut into a setting
    assert run(str(folder / "recipe.toml"), {"folder": str(tmp_path / "again")}).exists()


@pytest.mark.matrix(1)
@pytest.mark.parametrize("method", ["prefix_rft", "uft", "bread"])
def test_responses_that_the_expert_began_stay_within_the_context_of_learned_positions(
    method: str, tables: Tables, tmp_path: Path
) -> None:
    """GPT-2 has 64 positions and no more: one token beyond them is an IndexError."""
    sizes = {"vocab_size": len(VOCABULARY), "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model = {"init": {"model_type": "gpt2", **sizes}, "tokenizer": tables["model"]["tokenizer"]}
    rows = [{**row, "completion": "1" * (20 + 10 * i)} for i, row in enumerate(ROWS[:4])]
    path = write_rows(tmp_path / "long.jsonl", rows)
    recipe = changed(tables, {"model": model, "stages": ["rl"], "data.source": [path], "rl.max_tokens": 58})
    options = {"hints": "r3", "kl": 0.0} if method == "uft" else {}
    assert run(changed(recipe, {"rl.method": method, "rl.options": options, "rl.steps": 3, "rl.prompts": 4})).exists()


class Config:
    def __init__(self, **values: Any):
        self.__dict__ |= values


@pytest.mark.parametrize(
    ("config", "context"),
    [
        (Config(max_position_embeddings=2048), 2048),
        (Config(n_positions=1024), 1024),
        (Config(max_seq_len=512), 512),
        (Config(state_size=16), None),
        (Config(max_position_embeddings=2048, alibi=True), None),
        (Config(max_position_embeddings=4096, rope_scaling={"type": "linear", "factor": 2.0}), 8192),
        (
            Config(
                max_position_embeddings=32768,
                rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            ),
            131072,
        ),
        (
            Config(
                max_position_embeddings=131072,
                rope_parameters={"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
            ),
            131072,
        ),
        (
            Config(
                max_position_embeddings=1000,
                rope_parameters={"full": {"rope_type": "linear", "factor": 8.0}, "sliding": {"rope_type": "default"}},
            ),
            8000,
        ),
    ],
)
def test_the_context_is_what_the_configuration_says(config: Any, context: int | None) -> None:
    assert context_of(config) == context


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """No reward counts as tried by a test before."""
    monkeypatch.setattr(reward_trial, "_tried_rewards", {})
    return lambda: None


def test_dapos_penalty_follows_the_length_that_the_context_leaves(tmp_path):
    """The base of the embedded world has a context of 512; `max_tokens` is not set, and 8192 would never be reached."""
    tables = {
        "name": "cut",
        "folder": str(tmp_path / "run"),
        "stages": ["rl"],
        "model": {"path": "world:chain/rich"},
        "data": {"limit": 20},
        "rl": {"reward": "exact", "method": "dapo", "prompts": 2, "rollouts": 2, "steps": 1},
    }
    assert not [f for f in preflight(load_recipe(tables)) if f.state == "refused"]
    tables["rl"]["options"] = {"overlong_tokens": 8192, "overlong_buffer": 1000}
    refused = [f for f in preflight(load_recipe(tables)) if f.state == "refused"]
    assert refused
    assert "never act" in refused[0].reason


def test_a_dry_run_says_what_it_costs_before_it_refuses_a_missing_file(capsys):
    assert main(["run", "quickstart", "--eval.data.source", "absent.jsonl", "--dry-run"]) == 2
    said = capsys.readouterr()
    assert "FLOPs" in said.out
    assert "absent.jsonl: no such file" in said.err

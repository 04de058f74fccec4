"""What may change when a run is resumed: every field has a rule, and the rule is what happens."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.recipes import Tables, changed, file_recipe, write_rows
from tests.runs import stop_in_rl
from thence.cli import main
from thence.errors import UserError
from thence.pages.run.page import write_page
from thence.pipeline.changes import RULES
from thence.pipeline.context import StageContext
from thence.pipeline.folder import RunFolder
from thence.pipeline.run import run
from thence.pipeline.run_files import read_run
from thence.recipe import KINDS, Data, Model, Recipe, Sharding, Trackers, load_recipe

SECTIONS = {"": Recipe, "model": Model, "data": Data, "sharding": Sharding, "trackers": Trackers, **KINDS}
OWN_TABLES = {"": {"model", "data", "sharding", "trackers", "tables"}}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tables]:
    """Runs in three states, to be copied: done, with RL begun, and with the last training stage done alone."""
    made = {}
    at = tmp_path_factory.mktemp("kept")
    plain = changed(file_recipe(at), {"rl.checkpoint_every": 1})
    made["done"] = changed(plain, {"folder": str(at / "done"), "stages": ["sft", "rl", "eval"]})
    run(made["done"])
    made["begun"] = changed(plain, {"folder": str(at / "begun"), "stages": ["sft", "eval", "rl"], "rl.steps": 4})
    with pytest.MonkeyPatch.context() as patch:
        stop_after_steps(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(made["begun"])
    return made


def stop_after_steps(patch: pytest.MonkeyPatch, steps: int) -> None:
    """RL is stopped once it has logged a step after so many."""
    original = StageContext.log

    def log(self: StageContext, line: dict[str, Any]) -> None:
        if line["kind"] == "rl" and line["step"] > steps:
            raise KeyboardInterrupt
        original(self, line)

    patch.setattr(StageContext, "log", log)


@pytest.fixture
def done(kept: dict[str, Tables], tmp_path: Path) -> Tables:
    return copied(kept["done"], tmp_path)


@pytest.fixture
def begun(kept: dict[str, Tables], tmp_path: Path) -> Tables:
    return copied(kept["begun"], tmp_path)


def copied(recipe: Tables, tmp_path: Path) -> Tables:
    shutil.copytree(recipe["folder"], tmp_path / "run")
    return {**recipe, "folder": str(tmp_path / "run")}


def metrics(recipe: Tables, stage: str = "rl") -> list[dict[str, Any]]:
    lines = (Path(recipe["folder"]) / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["stage"] == stage]


def weights(recipe: Tables, stage: str = "rl") -> bytes:
    return (Path(recipe["folder"]) / "stages" / stage / "model" / "model.safetensors").read_bytes()


def history(recipe: Tables) -> list[dict[str, Any]]:
    file = Path(recipe["folder"]) / "changes.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line for line in lines if line["field"] != "folder"]


@pytest.mark.parametrize("table", SECTIONS)
def test_every_field_of_every_table_has_a_rule_and_every_rule_a_field(table: str) -> None:
    assert set(RULES[table]) == set(SECTIONS[table].model_fields) - OWN_TABLES.get(table, set())


def test_the_command_line_shows_the_rule_of_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--fields"]) == 0
    shown = capsys.readouterr().out.split("what may change when a run is resumed")[1].split()
    for table, fields in RULES.items():
        for name in fields:
            assert (f"--{table}.{name}" if table else f"--{name}").replace("_", "-") in shown


FREE = {
    "name": "other",
    "description": "words",
    "parallel": "fsdp2",
    "sharding.sum_every_pass": False,
    "trackers.project": "other",
    "model.trust_remote_code": True,
    "rl.checkpoint_every": 3,
    "rl.keep_every": 2,
    "rl.keep_last": 2,
    "rl.micro_batch_tokens": 64,
    "rl.packing": True,
    "rl.activation_checkpointing": True,
    "rl.rollout_rows": 2,
    "rl.reward_seconds": 5.0,
    "sft.held_out_every": 7,
    "eval.rollout_rows": 3,
}
ONWARD = {
    "rl.lr": 1e-7,
    "rl.clip_norm": 0.5,
    "rl.skip_norm": 50.0,
    "rl.warmup": 0.5,
    "rl.floor": 0.5,
    "rl.schedule": "linear",
    "rl.eval_every": 1,
}
LENGTH = {"rl.steps": 6, "rl.flops": None}
FIXED = {
    "seed": 7,
    "model.compute_dtype": "float64",
    "rl.temperature": 0.7,
    "rl.prompts": 4,
    "rl.rollouts": 4,
    "rl.max_tokens": 9,
    "rl.method": "dapo",
    "rl.betas": [0.9, 0.99],
    "rl.weight_decay": 0.5,
    "rl.unknown": "zero",
    "rl.reward": "exact",
    "rl.data": {"limit": 4},
    "data.limit": 4,
    "data.system": "x",
    "data.source": ["world:chain"],
    "sft.batch": 2,
    "sft.lr": 1e-4,
    "sft.steps": 2,
}


@pytest.mark.parametrize("field", FIXED)
@pytest.mark.parametrize("state", ["begun", "done"])
def test_what_may_not_change_is_refused_by_name_with_both_values(
    field: str, state: str, request: pytest.FixtureRequest
) -> None:
    recipe = request.getfixturevalue(state)
    folder, before = RunFolder(Path(recipe["folder"])), load_recipe(recipe)
    now = load_recipe(changed(recipe, {field: FIXED[field]}))
    with pytest.raises(UserError, match="holds a run with other settings") as error:
        folder.check(now)
    named = error.value.field or ""
    of_data = field.startswith("data.")
    assert named.endswith(field) if of_data else named.startswith(field)
    assert " was " in error.value.problem and ", now " in error.value.problem
    said = str(error.value).lower()
    assert "delete" not in said and "remove" not in said and "--restart" not in said
    assert folder.check(before).again == frozenset(), "with the old value it is resumed"


@pytest.mark.parametrize("field", [*FREE, *ONWARD, *LENGTH])
def test_what_may_change_in_a_stage_that_has_begun_does(field: str, begun: Tables) -> None:
    value = {**FREE, **ONWARD, **LENGTH}[field]
    plan = RunFolder(Path(begun["folder"])).check(load_recipe(changed(begun, {field: value})))
    expected = [] if value is None else [field]
    assert [change.field for change in plan.changes if change.field != "folder"] == expected
    assert not plan.again


@pytest.mark.parametrize("field", FREE)
def test_what_changes_no_number_may_change_in_a_finished_run(field: str, done: Tables) -> None:
    assert not RunFolder(Path(done["folder"])).check(load_recipe(changed(done, {field: FREE[field]}))).again


@pytest.mark.parametrize("field", [f for f in {**FREE, **ONWARD, **LENGTH, **FIXED} if f.startswith("rl.")])
def test_a_stage_that_has_not_begun_takes_any_settings(field: str, begun: Tables) -> None:
    shutil.rmtree(Path(begun["folder"]) / "stages" / "rl")
    value = {**FREE, **ONWARD, **LENGTH, **FIXED}[field]
    assert not RunFolder(Path(begun["folder"])).check(load_recipe(changed(begun, {field: value}))).again


def test_a_finished_run_is_given_more_steps_and_ends_with_the_bits_of_one_that_had_them(
    done: Tables, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    longer = changed(done, {"rl.steps": 3})
    two = weights(done)
    assert main(["run", recipe_file(done, tmp_path), "--rl.steps", "3"]) == 0
    whole = changed(longer, {"folder": str(tmp_path / "whole")})
    run(whole)
    assert weights(longer) == weights(whole)
    assert [line["step"] for line in metrics(longer)] == [1, 2, 3]
    assert [line["reward"] for line in metrics(longer)] == [line["reward"] for line in metrics(whole)]
    folder = Path(done["folder"])
    assert (folder / "set-aside" / "rl-1" / "model" / "model.safetensors").read_bytes() == two
    assert (folder / "set-aside" / "eval-1" / "result.json").exists(), "the new model is measured anew"
    results = [(Path(r["folder"]) / "stages" / "eval" / "result.json").read_text() for r in (longer, whole)]
    assert results[0] == results[1]
    assert history(done) == [
        {
            **history(done)[0],
            "field": "rl.steps",
            "before": 1,
            "now": 3,
            "after_step": 1,
            "follows": "the steps taken stand",
        }
    ]
    assert load_recipe(folder / "recipe.toml").resolved()["rl"]["steps"] == 3


def recipe_file(recipe: Tables, tmp_path: Path) -> str:
    from thence.toml import to_toml

    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(recipe))
    return str(file)


def test_a_schedule_that_ends_later_is_said(tables: Tables, caplog: pytest.LogCaptureFixture) -> None:
    recipe = changed(tables, {"stages": ["sft"], "sft.steps": 2})
    run(recipe)
    run(changed(recipe, {"sft.steps": 4}))
    assert "sft.steps was 2, now 4, after step 2: the learning rates of the steps to come follow" in caplog.text
    assert [line["step"] for line in metrics(recipe, "sft")] == [1, 2, 3, 4]


def test_a_budget_that_grows_continues_the_stage(tables: Tables) -> None:
    recipe = changed(tables, {"stages": ["rl"], "rl.steps": 50, "rl.tokens": 40})
    run(recipe)
    before = len(metrics(recipe))
    run(changed(recipe, {"rl.tokens": 120}))
    assert len(metrics(recipe)) > before
    assert [line["step"] for line in metrics(recipe)] == list(range(1, len(metrics(recipe)) + 1))


def test_a_stage_whose_optimizer_is_gone_says_what_to_do_instead_and_that_works(done: Tables, tmp_path: Path) -> None:
    shutil.rmtree(Path(done["folder"]) / "stages" / "rl" / "checkpoints")
    with pytest.raises(UserError, match=r"rl\.steps was 1, now 4.*optimizer is not kept") as error:
        run(changed(done, {"rl.steps": 4}))
    flags = shlex.split(error.value.remedy.split("from it: ")[1].split(" (a fresh")[0])
    flags[flags.index("ANOTHER")] = str(tmp_path / "another")
    plain = {key: value for key, value in done.items() if key not in ("folder", "model")}
    assert main(["run", recipe_file(plain, tmp_path), *flags, "--rl.steps", "4"]) == 0
    assert len(metrics({"folder": str(tmp_path / "another")})) == 4


def test_fewer_steps_than_were_taken_are_refused_and_enough_are_not(begun: Tables) -> None:
    with pytest.raises(UserError, match=r"rl\.steps was 4, now 1"):
        run(changed(begun, {"rl.steps": 1}))
    run(changed(begun, {"rl.steps": 2}))
    assert [line["step"] for line in metrics(begun)] == [1, 2]


def test_a_lower_rate_holds_from_the_checkpoint_on_and_is_kept_in_the_history(
    begun: Tables, caplog: pytest.LogCaptureFixture
) -> None:
    run(changed(begun, {"rl.lr": 1e-8}))
    assert [line["lr"] for line in metrics(begun)] == [1e-6, 1e-6, 1e-8, 1e-8]
    assert "rl.lr was 1e-06, now 1e-08, after step 2" in caplog.text
    kept_line = history(begun)
    assert [(c["field"], c["before"], c["now"], c["after_step"]) for c in kept_line] == [("rl.lr", 1e-6, 1e-8, 2)]
    folder = Path(begun["folder"])
    assert "rl.lr was 1e-06, and is 1e-08 after step 2" in read_run(folder).notes
    assert "rl.lr was 1e-06, and is 1e-08 after step 2" in write_page(folder).read_text()
    run(changed(begun, {"rl.lr": 1e-8}))
    assert len(history(begun)) == 1


def test_only_the_evaluation_that_has_changed_is_repeated(done: Tables) -> None:
    folder = Path(done["folder"])
    before = (weights(done, "sft"), weights(done), (folder / "metrics.jsonl").read_bytes())
    result = (folder / "stages" / "eval" / "result.json").read_text()
    run(changed(done, {"eval.samples": 2}))
    assert json.loads((folder / "stages" / "eval" / "result.json").read_text())["rows"][0]["samples"] == 2
    assert (folder / "set-aside" / "eval-1" / "result.json").read_text() == result
    assert (weights(done, "sft"), weights(done), (folder / "metrics.jsonl").read_bytes()) == before
    run(changed(done, {"eval.samples": 2, "eval.data.limit": 2}))
    assert json.loads((folder / "stages" / "eval" / "result.json").read_text())["rows"][0]["problems"] == 2
    assert (folder / "set-aside" / "eval-2" / "result.json").exists()
    assert [line["field"] for line in history(done)] == ["eval.samples", "eval.data.limit"]


def test_a_stage_may_be_added_and_one_that_has_begun_not_be_taken_away_or_moved(done: Tables) -> None:
    before = weights(done)
    run(changed(done, {"stages": ["eval-base", "sft", "rl", "eval", "eval-more"]}))
    assert (Path(done["folder"]) / "stages" / "eval-more" / "done.json").exists()
    assert weights(done) == before
    for stages in (["sft", "eval"], ["rl", "sft", "eval"], ["rl"]):
        with pytest.raises(UserError, match="stages was ") as error:
            run(changed(done, {"stages": stages}))
        assert error.value.field == "stages"


def test_a_training_stage_added_starts_from_the_last_one(done: Tables) -> None:
    run(changed(done, {"stages": ["sft", "rl", "eval", "rl-more"]}))
    folder = Path(done["folder"]) / "stages"
    assert weights(done, "rl-more")
    assert not (folder / "rl" / "checkpoints").exists() and (folder / "rl-more" / "checkpoints").exists()


def test_a_run_that_was_moved_is_resumed_where_it_is_now(begun: Tables, tmp_path: Path) -> None:
    whole = changed(begun, {"folder": str(tmp_path / "whole")})
    run(whole)
    moved = tmp_path / "far" / "away"
    moved.parent.mkdir()
    Path(begun["folder"]).rename(moved)
    there = changed(begun, {"folder": str(moved)})
    run(there)
    assert weights(there) == weights(whole)
    assert not Path(begun["folder"]).exists()


def test_files_that_were_moved_are_the_same_files_and_others_are_not(
    tables: Tables,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop_in_rl(tables, monkeypatch)
    new = tmp_path / "new"
    new.mkdir()
    for name in ("train.jsonl", "test.jsonl", "own.py", "tokenizer"):
        (tmp_path / name).rename(new / name)
    moved = changed(
        tables,
        {
            "data.source": [str(new / "train.jsonl")],
            "eval.data.source": [str(new / "test.jsonl")],
            "rl.reward": f"{new / 'own.py'}:share",
            "model.tokenizer": str(new / "tokenizer"),
        },
    )
    write_rows(tmp_path / "other.jsonl", [{"prompt": "1", "completion": "2", "answer": "2"}] * 8)
    with pytest.raises(UserError, match=r"other\.jsonl: the file was not there when stage sft was begun"):
        run(changed(moved, {"data.source": [str(tmp_path / "other.jsonl")]}))
    run(moved)
    assert (Path(tables["folder"]) / "stages" / "eval" / "done.json").exists()
    run(moved)


def test_several_changes_at_once_are_all_named_and_nothing_is_written(begun: Tables) -> None:
    from tests.folders import content

    before = content(Path(begun["folder"]))
    with pytest.raises(UserError) as error:
        run(changed(begun, {"rl.temperature": 0.5, "seed": 3, "eval.samples": 2, "rl.lr": 1e-8}))
    assert "seed was 0, now 3" in error.value.problem and "rl.temperature was 1.0, now 0.5" in error.value.problem
    assert "rl.lr" not in error.value.problem and "eval.samples" not in error.value.problem
    assert content(Path(begun["folder"])) == before


def test_a_dry_run_refuses_what_a_run_refuses(
    begun: Tables, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe_file(begun, tmp_path)
    assert main(["run", file, "--rl.temperature", "0.5", "--dry-run"]) == 2
    assert "rl.temperature was 1.0, now 0.5" in capsys.readouterr().err
    assert main(["run", file, "--rl.lr", "1e-8", "--dry-run"]) == 0


def test_a_change_that_is_killed_before_it_is_written_down_is_made_by_the_next_start(
    done: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "_record_changes", dies)
        run(changed(done, {"eval.samples": 2}))
    run(changed(done, {"eval.samples": 2}))
    rows = json.loads((Path(done["folder"]) / "stages" / "eval" / "result.json").read_text())["rows"]
    assert rows[0]["samples"] == 2
    assert load_recipe(Path(done["folder"]) / "recipe.toml").resolved()["eval"]["samples"] == 2

"""Recipes: what is written is what is read, and a mistake is named with its place and its remedy."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thence.errors import RecipeError
from thence.recipe import (
    Eval,
    Recipe,
    Rl,
    Sft,
    apply_overrides,
    build_recipe,
    kind_of,
    load_recipe,
    shipped_recipes,
)
from thence.settings.text_values import parse_value
from thence.toml import to_toml

MODEL = {"path": "some/model"}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)  # TOML has no surrogates


def tables(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "stages": ["sft"], **more}


def stage_of(recipe: Recipe, name: str) -> Any:
    return recipe.stage(name)


def refused(origin: Any, overrides: dict[str, Any] | None = None) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(origin, overrides)
    return caught.value


def round_trip(recipe: Any, folder: Path) -> Any:
    file = folder / "again.toml"
    file.write_text(to_toml(recipe.resolved()), encoding="utf-8")
    return load_recipe(file)


# Reading and writing.


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_shipped_recipe_survives_writing_and_reading(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name)
    again = round_trip(recipe, tmp_path)
    assert again.resolved() == recipe.resolved()
    assert again == recipe
    assert all(stage_of(again, stage) == stage_of(recipe, stage) for stage in recipe.stages)
    assert recipe.name == name
    assert recipe.description


def test_there_are_shipped_recipes_and_they_open_by_name_and_by_path() -> None:
    assert "quickstart" in shipped_recipes()
    assert load_recipe("quickstart") == load_recipe(shipped_recipes()["quickstart"])


@pytest.mark.parametrize(
    "changed",
    [
        {"description": 'quo"te \\ back\nline \x00 \x7f ümlaut 🙂 #not a comment'},
        {"sft": {"lr": 1e-30, "eps": 1e-20, "betas": [0.0, 0.5], "options": {"a": {"b.c": [1, {"d e": True}]}}}},
        {"data": {"template": "{%- for m in messages -%}\n{{ m['content'] }}\t'''\"\"\"\n{%- endfor -%}\n"}},
        {"data": {"columns": {"question": "a key with blanks", "answer": "x"}, "limit": 3, "system": ""}},
        {"model": {"init": {"model_type": "llama", "rope": {"factor": 2.0, "names": []}}, "tokenizer": "there"}},
        {"stages": ["sft", "eval"], "eval": {"splits": {"in-distribution": {"limit": 2}, "a.b": {"limit": 3}}}},
    ],
    ids=["text", "numbers", "template", "columns", "init", "splits"],
)
def test_awkward_values_survive_writing_and_reading(changed: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(tables(**changed))
    assert round_trip(recipe, tmp_path) == recipe
    assert round_trip(recipe, tmp_path).resolved() == recipe.resolved()


def test_a_split_without_overrides_survives_writing_and_reading(tmp_path: Path) -> None:
    recipe = load_recipe(tables(stages=["eval"], eval={"splits": {"test": {}, "ood": {"split": "ood"}}}))
    assert set(stage_of(round_trip(recipe, tmp_path), "eval").splits) == {"test", "ood"}


@given(
    st.dictionaries(
        TEXT,
        st.recursive(
            st.one_of(
                st.booleans(),
                st.integers(-(2**63), 2**63 - 1),
                st.floats(allow_nan=False),
                TEXT,
            ),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, min_size=1, max_size=3),
            max_leaves=6,
        ),
        max_size=4,
    )
)
def test_any_plain_values_survive_writing_and_reading(table: dict[str, Any]) -> None:
    assert tomllib.loads(to_toml(table)) == table


# Stages.


def test_a_stage_inherits_the_table_of_its_kind() -> None:
    recipe = load_recipe(
        {
            "model": MODEL,
            "stages": ["eval-base", "sft", "eval-sft", "sft-two", "rl", "eval"],
            "eval": {"samples": 4, "max_tokens": 50},
            "eval-base": {"samples": 1},
            "sft": {"lr": 0.5, "batch": 3},
            "sft-two": {"lr": 0.25},
        }
    )
    assert [type(stage_of(recipe, name)) for name in recipe.stages] == [Eval, Sft, Eval, Sft, Rl, Eval]
    assert [stage_of(recipe, name).samples for name in ("eval-base", "eval-sft", "eval")] == [1, 4, 4]
    assert stage_of(recipe, "eval-base").max_tokens == 50
    assert (stage_of(recipe, "sft").lr, stage_of(recipe, "sft-two").lr, stage_of(recipe, "sft-two").batch) == (
        0.5,
        0.25,
        3,
    )


def test_without_tables_stages_have_the_defaults_of_the_paper() -> None:
    recipe = load_recipe({"model": MODEL})
    assert recipe.stages == ["sft", "rl", "eval"]
    sft, rl = stage_of(recipe, "sft"), stage_of(recipe, "rl")
    assert (sft.lr, sft.batch, sft.epochs, sft.schedule, sft.warmup, sft.floor) == (5e-5, 64, 3, "cosine", 0.1, 0.1)
    assert (rl.lr, rl.steps, rl.prompts, rl.rollouts, rl.schedule) == (1e-6, 500, 128, 8, "constant")
    assert (rl.temperature, rl.max_tokens) == (1.0, 8192)
    assert stage_of(recipe, "eval").temperatures == [0.6]


def test_a_stages_data_are_overrides_of_the_data_table() -> None:
    recipe = load_recipe(tables(data={"source": ["a.jsonl"], "limit": 9}, sft={"data": {"limit": 4}}))
    data = recipe.stage_data(stage_of(recipe, "sft").data)
    assert (data.source, data.limit, recipe.data.limit) == (["a.jsonl"], 4, 9)
    with pytest.raises(RecipeError, match=r"data\.limmit"):
        recipe.stage_data({"limmit": 4})


@pytest.mark.parametrize("stage", ["sft", "sft-two", "sft-two-three"])
def test_the_kind_of_a_stage_ends_at_the_first_dash(stage: str) -> None:
    assert kind_of(stage) == "sft"


@pytest.mark.parametrize("stages", [["warmup"], ["sftx"], ["SFT"], ["eval_base"], [""]])
def test_a_stage_without_a_kind_is_refused(stages: list[str]) -> None:
    error = refused({"model": MODEL, "stages": stages})
    assert repr(stages[0]) in error.problem
    assert "sft, rl, eval" in error.remedy
    assert error.field == "stages"


@pytest.mark.parametrize("stages", ["sft", [], [1], {"sft": 1}])
def test_stages_have_to_be_a_list_of_names(stages: Any) -> None:
    error = refused({"model": MODEL, "stages": stages})
    assert error.field == "stages"
    assert 'write stages = ["sft", "rl"]' in error.remedy


def test_a_stage_named_twice_is_refused() -> None:
    assert "twice" in refused({"model": MODEL, "stages": ["eval", "sft", "eval"]}).problem


def test_fewer_stages_may_be_run_of_a_recipe_with_tables_for_more() -> None:
    recipe = load_recipe("paper-qwen", {"stages": '["sft"]'})
    assert recipe.stages == ["sft"]
    assert stage_of(recipe, "sft").epochs == 3


# Overrides.


def test_overrides_of_every_form_reach_their_field() -> None:
    recipe = load_recipe(
        "quickstart",
        {
            "sft.lr": "2e-5",
            "rl.max-tokens": "33",
            "rl.mini_batch": 16,
            "eval-sft.samples": "7",
            "eval.temperatures": "[0.0, 1]",
            "data.source": '["a.jsonl", "b.jsonl"]',
            "data.skip-bad": "true",
            "sft.data.limit": "5",
            "model.path": "other/model",
            "rl.options.clip-high": "0.3",
            "seed": "3",
            "name": "mine",
        },
    )
    sft, rl = stage_of(recipe, "sft"), stage_of(recipe, "rl")
    assert (sft.lr, rl.max_tokens, rl.mini_batch) == (2e-5, 33, 16)
    assert (stage_of(recipe, "eval-sft").samples, stage_of(recipe, "eval-base").samples) == (7, 4)
    assert stage_of(recipe, "eval-rl").temperatures == [0.0, 1.0]
    assert (recipe.data.source, recipe.data.skip_bad, sft.data) == (["a.jsonl", "b.jsonl"], True, {"limit": 5})
    assert (recipe.model.path, recipe.seed, recipe.name) == ("other/model", 3, "mine")
    assert rl.options == {"clip_high": 0.3}


def test_overrides_leave_what_they_are_laid_over_alone() -> None:
    own = tables(sft={"lr": 0.5, "data": {"limit": 1}}, data={"source": ["a"]})
    changed = apply_overrides(own, {"sft.data.limit": 2, "sft.lr": 0.1, "data.source": ["b"]})
    assert own == tables(sft={"lr": 0.5, "data": {"limit": 1}}, data={"source": ["a"]})
    assert changed == tables(sft={"lr": 0.1, "data": {"limit": 2}}, data={"source": ["b"]})


def test_a_dash_in_the_name_of_a_split_is_kept() -> None:
    recipe = load_recipe("quickstart", {"eval.splits.in-distribution.limit": "16"})
    splits = stage_of(recipe, "eval-base").splits
    assert set(splits) == {"in-distribution", "out-of-distribution"}
    assert splits["in-distribution"]["limit"] == 16


@pytest.mark.parametrize("order", [("stages", "sft-two.lr"), ("sft-two.lr", "stages")])
def test_an_override_may_name_a_stage_that_another_override_adds(order: tuple[str, str]) -> None:
    values = {"stages": '["sft", "sft-two"]', "sft-two.lr": "0.25"}
    recipe = load_recipe({"model": MODEL}, {key: values[key] for key in order})
    assert stage_of(recipe, "sft-two").lr == 0.25


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("true", True),
        ("50", 50),
        ("[1, 2]", [1, 2]),
        ("{a = 1}", {"a": 1}),
        ('"7"', "7"),
        ("runs/mine", "runs/mine"),
        ("gsm8k", "gsm8k"),
        ("", ""),
        ("C:\\data\\a.jsonl", "C:\\data\\a.jsonl"),
    ],
)
def test_a_flags_text_is_a_toml_value_or_else_text(text: str, value: Any) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


def test_an_override_below_a_plain_field_is_refused() -> None:
    error = refused(tables(name="mine"), {"name.more": 1})
    assert "name is not a table" in error.problem
    assert error.field == "--name.more"


def test_an_override_with_a_typo_is_refused_with_the_right_name() -> None:
    error = refused("quickstart", {"rl.max-tokes": "3"})
    assert error.field == "--rl.max-tokes"  # as it was written
    assert "'max_tokens'" in error.remedy


# Mistakes.


def written(folder: Path, text: str) -> Path:
    file = folder / "mine.toml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("text", "field", "hint"),
    [
        ("[sft]\nlearning_rat = 1", "sft.learning_rat", "fields are: "),
        ("[sft]\nbach = 1", "sft.bach", "'batch'"),
        ("[sft-two]\nepoch = 1", "sft-two.epoch", "'epochs'"),
        ("[data]\nsorce = []", "data.sorce", "'source'"),
        ("sed = 1", "sed", "'seed'"),
        ("[slt]\nlr = 1", "slt", "'sft'"),
        ("[eval]\nlr = 1", "eval.lr", "fields are: "),
        ("[tables.sft]\nlr = 1", "tables", "fields are: "),
    ],
)
def test_an_unknown_key_is_named_with_its_file_and_the_likely_name(
    text: str, field: str, hint: str, tmp_path: Path
) -> None:
    file = written(tmp_path, f'stages = ["sft", "sft-two", "eval"]\n{text}\n[model]\npath = "m"\n')
    error = refused(file)
    assert error.problem == "unknown key"
    assert (error.file, error.field) == (str(file), field)
    assert hint in error.remedy
    assert str(file) in str(error)


@pytest.mark.parametrize(
    ("text", "field", "shown"),
    [
        ('[sft]\nlr = "fast"', "sft.lr", "'fast'"),
        ("[sft]\nbatch = 1.5", "sft.batch", "1.5"),
        ("[sft]\nbatch = 0", "sft.batch", "0"),
        ("[sft]\nlr = 0", "sft.lr", "0"),
        ("[sft]\nclip_norm = -1", "sft.clip_norm", "-1"),
        ('[sft]\nschedule = "step"', "sft.schedule", "'step'"),
        ("[sft]\nbetas = [0.9]", "sft.betas", ""),
        ("[sft]\nwarmup = 2", "sft.warmup", "2"),
        ("[rl]\ntop_p = 0", "rl.top_p", "0"),
        ("[rl]\nprompts = 10\nmini_batch = 3", "rl", "mini_batch 3 does not divide prompts 10"),
        ('[data]\nsource = "a.jsonl"', "data.source", "'a.jsonl'"),
        ("[data]\nlimit = 0", "data.limit", "0"),
        ('seed = "one"', "seed", "'one'"),
    ],
)
def test_a_wrong_value_is_named_with_its_file_and_field(text: str, field: str, shown: str, tmp_path: Path) -> None:
    file = written(tmp_path, f'stages = ["sft", "rl"]\n{text}\n[model]\npath = "m"\n')
    error = refused(file)
    assert error.file == str(file)
    assert error.field is not None
    assert error.field.startswith(field)
    assert shown in error.problem


def test_a_table_that_is_none_is_refused() -> None:
    assert refused(tables(sft=3)).field == "sft"


def test_a_broken_file_is_refused_with_its_line(tmp_path: Path) -> None:
    file = written(tmp_path, 'name = "a"\nseed = = 1\n')
    error = refused(file)
    assert (error.file, error.line) == (str(file), 2)


def test_a_recipe_that_is_not_there_is_refused_with_the_likely_name(tmp_path: Path) -> None:
    assert "'quickstart'" in refused("quickstrat").remedy
    assert "thence recipes" in refused("quickstrat").remedy
    assert "a folder is no file" in refused(tmp_path).problem


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ({}, "exactly one of path and init"),
        ({"path": "m", "init": {"model_type": "llama"}}, "exactly one of path and init"),
        ({"init": {"model_type": "llama"}}, "init needs a tokenizer"),
    ],
)
def test_a_model_has_one_origin(model: dict[str, Any], problem: str) -> None:
    error = refused({"model": model, "stages": ["sft"]})
    assert problem in error.problem
    assert error.field is not None
    assert error.field.startswith("model")


def test_a_recipe_without_a_model_is_refused() -> None:
    assert refused({"stages": ["sft"]}).field == "model"


def test_zero_switches_clipping_off_and_is_kept(tmp_path: Path) -> None:
    recipe = load_recipe(tables(sft={"clip_norm": 0}))
    assert stage_of(recipe, "sft").clip_norm == 0.0
    assert stage_of(round_trip(recipe, tmp_path), "sft").clip_norm == 0.0
    assert stage_of(load_recipe(tables()), "sft").clip_norm == 1.0


def test_a_recipe_cannot_be_changed() -> None:
    recipe = build_recipe(tables())
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 2
    with pytest.raises(ValueError, match="frozen"):
        stage_of(recipe, "sft").lr = 2.0


def test_the_run_folder_follows_from_name_and_seed_unless_it_is_given() -> None:
    assert load_recipe(tables(name="a", seed=3)).run_folder() == Path("runs/a-seed3")
    assert load_recipe(tables(folder="there")).run_folder() == Path("there")


def test_recipes_are_read_without_torch() -> None:
    code = """
import sys
from thence.recipe import load_recipe, shipped_recipes
from thence.settings.text_values import parse_value
from thence.toml import to_toml
for name in shipped_recipes():
    to_toml(load_recipe(name).resolved())
heavy = {"torch", "transformers", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""Refusals speak the user's words: the rule, the value as TOML has it, the field as it was written."""

from __future__ import annotations

import datetime
import math
import re
from typing import Any

import pytest

from thence.errors import RecipeError
from thence.methods.registry import make_method
from thence.recipe import load_recipe
from thence.settings.limits import Seed
from thence.settings.validation import validated
from thence.wording import duration

FOREIGN = re.compile(r"Input should|valid (tuple|list|integer|string|number)|NoneType|\b(dict|int|True|False)\b")


def refused(overrides: dict[str, Any] | None = None, **tables: Any) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe({"model": {"path": "m"}, "stages": ["sft", "rl", "eval"], **tables}, overrides)
    assert not FOREIGN.search(str(caught.value)), str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({"sft": {"steps": True}}, "must be a whole number, not true"),
        ({"sft": {"steps": None, "lr": "8"}}, "must be a number, not '8'"),
        ({"sft": {"lr": math.nan}}, "must be a finite number, not nan"),
        ({"sft": {"lr": 0}}, "must be above 0, not 0"),
        ({"sft": {"steps": 10**30}}, "must be at most 10,000,000, not 1000000000000000000000000000000"),
        ({"sft": {"steps": datetime.date(1979, 5, 27)}}, "must be a whole number, not 1979-05-27"),
        ({"sft": {"packing": 1}}, "must be true or false, not 1"),
        ({"sft": {"schedule": "cosin"}}, "must be one of constant, linear, cosine, not 'cosin'"),
        ({"sft": {"betas": [0.9]}}, "must be a list of two numbers, not [0.9]"),
        ({"sft": {"betas": [True, 0.9]}}, "the first value must be a number, not true"),
        ({"data": {"source": [3]}}, "the first value must be a path or a hub name, in quotes, not 3"),
        ({"data": {"source": []}}, "the list is empty"),
        ({"data": {"columns": [1]}}, "must be a table, not [1]"),
        ({"data": {"columns": {"answer": {"a": True}}}}, "must be a text in quotes, not {a = true}"),
        ({"sft": 3}, "must be a table, not 3"),
        ({"stages": [3]}, "must be a list of names, not [3]"),
    ],
)
def test_a_problem_is_said_in_plain_words(table: dict[str, Any], problem: str) -> None:
    assert refused(**table).problem == problem


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("0.9,1.5", "the second value must be below 1, not 1.5"),
        ("0.9", "must be a list of two numbers, not 0.9"),
        ("0.9,x", "must be a list of two numbers, not '0.9,x'"),
    ],
)
def test_a_list_on_the_command_line_is_named_with_the_value_that_fails(written: str, problem: str) -> None:
    error = refused({"sft.betas": written})
    assert (error.field, error.problem) == ("--sft.betas", problem)
    assert "written 0.9,0.95 on the command line or [0.9, 0.95] in TOML" in error.remedy


def test_numbers_of_a_list_may_stand_with_commas_between() -> None:
    recipe = load_recipe({"model": {"path": "m"}}, {"sft.betas": "0.8,0.9", "eval.temperatures": "0,0.6"})
    assert recipe.stage("sft").betas == (0.8, 0.9)  # type: ignore[union-attr]
    assert recipe.stage("eval").temperatures == [0, 0.6]  # type: ignore[union-attr]


def test_a_field_is_named_as_it_was_written() -> None:
    tables = {"stages": ["sft-short"], "sft": {"lr": "x"}}
    assert refused(**tables).field == "sft.lr"
    assert refused(**{**tables, "sft-short": {"lr": "x"}}).field == "sft-short.lr"
    assert refused({"eval.max-tokens": "0"}).field == "--eval.max-tokens"
    with pytest.raises(RecipeError) as caught:
        make_method("dapo", {"clip_low": "x"}, "rl", "rl-two")
    assert caught.value.field == "rl-two.options.clip_low"


def test_any_type_of_limits_can_be_validated() -> None:
    assert validated(Seed, 3) == 3  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"--seed: must be at least 0, not -1"):
        validated(Seed, -1, "--seed")  # type: ignore[arg-type]


def test_durations_are_read_as_people_say_them() -> None:
    said = [duration(seconds) for seconds in (0, 0.04, 1.26, 9.99, 59.6, 125, 7800, 3599.9)]
    assert said == ["0 s", "0 s", "1.3 s", "10 s", "1 min 0 s", "2 min 5 s", "2 h 10 min", "1 h 0 min"]

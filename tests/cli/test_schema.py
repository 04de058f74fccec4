"""`thence schema`: what an editor is told about recipes and comparisons is what thence takes."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import jsonschema
import pytest

from tests import ROOT
from thence.cli import main
from thence.cli.fields import field_flags
from thence.compare.json_schema import comparison_schema
from thence.compare.recipe import shipped_comparisons
from thence.recipe import shipped_recipes
from thence.recipe.json_schema import recipe_schema

RECIPES = sorted(shipped_recipes().items())
COMPARISONS = sorted([*shipped_comparisons().values(), *ROOT.glob("studies/*/study.toml")])


@pytest.mark.parametrize(("name", "file"), RECIPES, ids=[name for name, _ in RECIPES])
def test_shipped_recipes_are_valid(name: str, file: Any) -> None:
    jsonschema.validate(tomllib.loads(file.read_text()), recipe_schema())


@pytest.mark.parametrize("file", COMPARISONS, ids=lambda file: file.stem)
def test_comparisons_are_valid(file: Any) -> None:
    jsonschema.validate(tomllib.loads(file.read_text()), comparison_schema())


@pytest.mark.parametrize(
    "wrong",
    [
        {"sft": {"lr": -1.0}},
        {"sft": {"lerning_rate": 1e-5}},
        {"rl-second": {"rollouts": "eight"}},
        {"modle": {"path": "x"}},
        {"parallel": "fsdp3"},
    ],
    ids=str,
)
def test_what_a_recipe_refuses_is_no_valid_one(wrong: dict[str, Any]) -> None:
    base: dict[str, Any] = {"model": {"path": "world:chain/rich"}}
    jsonschema.validate(base | {"rl-second": {"steps": 3}}, recipe_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(base | wrong, recipe_schema())


def test_every_field_of_a_recipe_is_in_the_schema_with_its_meaning() -> None:
    schema = recipe_schema()
    for flag in field_flags():
        table = schema
        for part in flag.removeprefix("--").replace("-", "_").split("."):
            table = resolved(schema, table["properties"][part])
        assert "description" in table or "$ref" in table, flag


def resolved(schema: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    """A part of the schema, with what it refers to; the description beside a reference stays."""
    for option in [table, *table.get("anyOf", [])]:
        if "$ref" in option:
            return schema["$defs"][option["$ref"].rpartition("/")[2]] | table
    return table


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(recipe_schema()))
    assert main(["schema", "comparison"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "A comparison of thence"
    assert main(["schema", "recipes"]) == 2

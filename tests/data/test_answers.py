"""Numbers and answers as they are read, and what the command line takes for a field."""

from __future__ import annotations

import ast
import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import thence.data
from thence.cli.fields import take_fields
from thence.data.numbers import normal_answer, number_text, without_separators
from thence.data.readers import read_examples
from thence.errors import DataError, UserError
from thence.evaluate.suites import load_suite
from thence.recipe import Data, load_recipe, type_of
from thence.verify.exact import grade_exact
from thence.verify.verdict import Verdict


def answers(folder: Path, rows: list[dict[str, Any]]) -> list[str | None]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [example.answer for example in read_examples(str(file))[0]]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("1,234", "1234"),
        ("-12,345.6", "-12345.6"),
        ("$1,000", "$1000"),
        ("1,000,000", "1000000"),
        ("2,500 km", "2500 km"),
        ("(1,2)", "(1,2)"),
        ("3,5", "3,5"),
        ("(1,234)", "(1,234)"),
        ("1,2345", "1,2345"),
        ("12,34,567", "12,34,567"),
        ("1,000, 2,000", "1,000, 2,000"),
        ("1234,567", "1234,567"),
        ("1_000", "1000"),
        ("\N{MINUS SIGN}5", "-5"),
        ("1/2", "1/2"),
        ("50%", "50%"),
    ],
)
def test_only_real_thousands_separators_are_taken_out_of_worked_answers(tmp_path, written, read):
    assert answers(tmp_path, [{"question": "q", "answer": f"working\n#### {written} "}]) == [read]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (42.0, "42"),
        (42, "42"),
        (1e-05, "0.00001"),
        (-0.0, "0"),
        (0.5, "0.5"),
        (1e22, "1" + "0" * 22),
        (10**40, "1" + "0" * 40),
        (" 42 ", "42"),
        ("1e-05", "1e-05"),
    ],
)
def test_a_json_number_is_written_in_digits(tmp_path, value, text):
    assert answers(tmp_path, [{"question": "q", "answer": value}]) == [text]
    assert answers(tmp_path, [{"prompt": "q", "reward_model": {"ground_truth": value}}]) == [text]


@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), [1]])
def test_what_is_no_answer_is_refused(tmp_path, value):
    with pytest.raises(DataError) as caught:
        answers(tmp_path, [{"question": "q", "answer": value}])
    assert caught.value.line == 1


@pytest.mark.parametrize(
    ("column", "read"),
    [
        (pa.array([Decimal("42.00"), Decimal("0.10")]), ["42", "0.1"]),
        (pa.array([0.1, 42.0], pa.float32()), ["0.1", "42"]),
        (pa.array([0.1, 1e-5], pa.float64()), ["0.1", "0.00001"]),
        (pa.array([7, -1], pa.int8()), ["7", "-1"]),
    ],
)
def test_parquet_numbers_of_every_type_read_the_same(tmp_path, column, read):
    pq.write_table(pa.table({"question": ["a", "b"], "answer": column}), tmp_path / "rows.parquet")
    assert [e.answer for e in read_examples(str(tmp_path / "rows.parquet"))[0]] == read


def test_a_single_precision_column_keeps_its_nulls(tmp_path):
    table = pa.table({"prompt": ["a", "b"], "answer": pa.array([0.1, None], pa.float32())})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert [e.answer for e in read_examples(str(tmp_path / "rows.parquet"))[0]] == ["0.1", None]


@pytest.mark.parametrize(
    ("response", "gold", "same"),
    [
        ("1,234", "1234", True),
        ("1234", "1,234", True),
        ("$1,000.00", "1000", True),
        ("42.0", "42", True),
        ("42", "42.0", True),
        ("\N{MINUS SIGN}5", "-5", True),
        ("50 %", "50%", True),
        ("-0", "0", True),
        ("0.50", ".5", False),
        ("3,5", "35", False),
        ("(1,2)", "(12)", False),
        ("1/2", "0.5", False),
        ("007", "7", False),
        ("+5", "5", False),
        ("50%", "50", False),
    ],
)
def test_exact_reads_both_sides_in_one_normal_form(response, gold, same):
    assert (grade_exact(f"so #{response}$", gold).verdict is Verdict.RIGHT) is same


def test_the_normal_form_is_its_own_normal_form():
    for text in ("1,234", "$-5.00", "42.0", "50 %", "x, y", "", "-0.0", "1_000", "2,500 apples"):
        assert normal_answer(normal_answer(text)) == normal_answer(text)
        assert without_separators(without_separators(text)) == without_separators(text)
    assert number_text(True) == "1" and number_text(Decimal("1E+3")) == "1000"


# The command line.

PLAIN = {"model": {"path": "m"}, "stages": ["rl", "eval-late"]}


def given(*flags: str) -> Any:
    return load_recipe(PLAIN, take_fields(flags)[1])


@pytest.mark.parametrize(
    "text", ["2024-01-01", "1", "true", "1e5", "12:30", "2024", "0x10", "1_000", "nan", "[x]", "{a = 1}"]
)
def test_a_text_field_takes_any_text(text):
    recipe = given("--description", text, "--folder", text, "--data.split", text, "--model.path", text)
    texts = (recipe.description, recipe.folder, recipe.data.split, recipe.model.path)
    assert texts == (text,) * 4
    recipe = given("--rl.data.split", text)
    assert recipe.stage_data(recipe.stage("rl").data).split == text
    assert given("--data.columns.question", text).data.columns == {"question": text}
    assert load_suite("gsm8k", {"system": text}).tasks[0].system == text


def test_other_fields_still_take_toml_values():
    recipe = given("--seed", "7", "--rl.lr", "1e-5", "--data.skip-bad", "--rl.betas", "[0.8, 0.9]", "--name", '"x-y"')
    assert (recipe.seed, recipe.stage("rl").lr, recipe.data.skip_bad, recipe.name) == (7, 1e-5, True, "x-y")
    assert recipe.stage("rl").betas == (0.8, 0.9)
    assert given("--data.source", "a.jsonl").data.source == ["a.jsonl"]
    assert given("--data.source", '["a", "b"]').data.source == ["a", "b"]
    assert given("--model.config_overrides", "rope_theta=40000").model.config_overrides == {"rope_theta": 40000}


def test_a_text_field_without_a_value_is_refused():
    with pytest.raises(UserError):
        given("--name", "--seed", "1")


@pytest.mark.parametrize(
    "flags",
    [
        ("--data.columns", "question=problem,answer=solution"),
        ("--data.columns=question=problem,answer=solution",),
        ("--data.columns", "question=problem", "--data.columns", "answer=solution"),
        ("--data.columns", '{question = "problem", answer = "solution"}'),
        ("--data.columns.question", "problem", "--data.columns.answer", "solution"),
    ],
)
def test_columns_can_be_named_in_every_way_that_a_user_would_try(flags):
    assert given(*flags).data.columns == {"question": "problem", "answer": "solution"}
    assert given("--data.columns", "question=a,b").data.columns == {"question": "a,b"}


def remedies() -> list[str]:
    """Every flag, with the value shown beside it, in a text of the data package."""
    found = set()
    for file in Path(thence.data.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [
                p.value if isinstance(p, ast.Constant) else "question"
                for p in parts
                if not isinstance(p, ast.Constant) or isinstance(p.value, str)
            ]
            found |= set(re.findall(r"--data\.[a-z-]+(?: [\w]+=[\w]+)?", "".join(map(str, texts))))
    return sorted(found)


@pytest.mark.parametrize("remedy", remedies())
def test_every_flag_in_a_remedy_of_the_readers_is_accepted(remedy):
    name, _, value = remedy.partition(" ")
    assert type_of(name[2:]) is not Any, f"{name} is no field"
    examples = {
        "--data.layout": "messages",
        "--data.columns": "question=problem",
        "--data.template": "none",
        "--data.system": "be brief",
        "--data.max-prompt-tokens": "64",
        "--data.max-response-tokens": "64",
    }
    recipe = given(name, *([value or examples[name]] if value or name in examples else []))
    assert recipe.data != Data()


def test_the_remedies_were_found():
    assert {"--data.columns question=problem", "--data.skip-bad", "--data.layout"} <= set(remedies())


def test_the_evaluation_names_a_remedy_of_its_own_command_line(tmp_path):
    from thence.evaluate.problems import load_problems

    file = tmp_path / "own.jsonl"
    file.write_text('{"exercise": "1+1?", "result": 2.0}\n')
    with pytest.raises(DataError) as caught:
        load_problems(load_suite(str(file)).tasks[0])
    found = re.search(r"--set '(.+)'", caught.value.remedy)
    assert found is not None
    field, _, value = found[1].replace("COLUMN", "exercise", 1).replace("COLUMN", "result", 1).partition("=")
    (problem,) = load_problems(load_suite(str(file), {field: value}).tasks[0])
    assert (problem.text, problem.answer) == ("1+1?", "2")

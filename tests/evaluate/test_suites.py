"""Suites: those that are shipped, files of your own, overrides, and errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.suite_files import MMLU, task_of, write_lines
from thence.errors import DataError, RecipeError, UserError
from thence.evaluate.problems import load_problems
from thence.evaluate.suites import load_suite, shipped_suites


def test_shipped_suites_are_the_papers_benchmarks() -> None:
    assert sorted(shipped_suites()) == ["embedded", "gsm8k", "paper-id", "paper-ood"]
    inside, outside = load_suite("paper-id"), load_suite("paper-ood")
    assert {task.name: task.samples for task in inside.tasks} == {
        "aime24": 32,
        "aime25": 32,
        "amc": 32,
        "math500": 1,
        "minerva": 1,
        "olympiad": 1,
    }
    assert [task.name for task in outside.tasks] == ["arc_c", "gpqa_diamond", "mmlu_pro"]
    for task in inside.tasks + outside.tasks:
        assert (task.temperature, task.top_p, task.max_tokens, task.grader) == (0.6, 1.0, 8192, "math")
        assert task.source and task.files
    assert {task.group for task in inside.tasks} == {"ID"}
    assert all(task.choices and task.shuffle_options and task.group == "OOD" for task in outside.tasks)


def test_suites_load_without_torch() -> None:
    code = (
        "import sys, thence.evaluate.suites as s, thence.evaluate.problems, thence.evaluate.metrics\n"
        "[s.load_suite(name) for name in s.shipped_suites()]\n"
        "sys.exit(len({'torch', 'transformers', 'sympy', 'datasets', 'pyarrow'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


OWN = """
description = "mine"

[defaults]
samples = 4

[[tasks]]
name = "sums"
files = ["sums.jsonl"]
columns = { question = "problem", answer = "gold" }
filter = { kind = "sum" }

[[tasks]]
name = "words"
files = ["words.jsonl"]
samples = 2
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "mine.toml").write_text(OWN)
    rows = [{"problem": "1+1?", "gold": 2, "kind": "sum"}, {"problem": "2*3?", "gold": 6, "kind": "product"}]
    write_lines(folder / "sums.jsonl", rows)
    return folder / "mine.toml"


def test_an_own_suite_finds_the_files_beside_it(own: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    suite = load_suite(str(own))
    assert (suite.name, suite.description) == ("mine", "mine")
    assert [task.samples for task in suite.tasks] == [4, 2]
    monkeypatch.chdir(tmp_path)
    (problem,) = load_problems(suite.tasks[0])
    assert (problem.text, problem.answer) == ("1+1?", "2")
    assert load_problems(suite.tasks[0], tmp_path) == [problem]
    with pytest.raises(UserError, match=r"words: no file words.jsonl[\s\S]*--data DIR"):
        load_problems(suite.tasks[1])


def test_a_data_file_is_a_suite_of_one_task(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "my problems.v2.jsonl", [{"question": "1+1?", "answer": "2"}])
    suite = load_suite(str(file), {"samples": "8", "temperature": 1})
    assert (suite.name, suite.tasks[0].samples, suite.tasks[0].temperature) == ("my-problems", 8, 1.0)
    assert load_problems(suite.tasks[0])[0].messages == (("user", "1+1?"),)


def test_overrides_hold_for_all_tasks_or_one() -> None:
    suite = load_suite("paper-id", {"aime24.samples": 2, "max-tokens": "16", "samples": 1, "tasks": ["amc", "aime24"]})
    assert [(task.name, task.samples, task.max_tokens) for task in suite.tasks] == [("aime24", 2, 16), ("amc", 1, 16)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"aime.samples": 2}, r"paper-id.toml: aime.samples: no task 'aime'[\s\S]*did you mean 'aime2"),
        ({"tasks": "amcc"}, r"no task 'amcc'[\s\S]*did you mean 'amc'"),
        ({"sample": 2}, r"sample: unknown key[\s\S]*did you mean 'samples'"),
        ({"amc.samples": 0}, r"amc.samples: must be at least 1, not 0[\s\S]*Responses for each"),
        ({"template": "nope"}, r"template is neither one of own, question, boxed, letter, steps"),
        ({"name": "x"}, "two tasks are called x"),
        ({"source": "world:chain"}, "set problems"),
    ],
)
def test_overrides_that_make_no_sense_are_explained(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_suite("paper-id", overrides)


def test_unknown_suites_and_broken_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no suite 'paper-di'[\s\S]*did you mean 'paper-id'"):
        load_suite("paper-di")
    broken = tmp_path / "broken.toml"
    broken.write_text('name = "x"\n[[tasks]\n')
    with pytest.raises(RecipeError, match=r"broken.toml:2: not valid TOML"):
        load_suite(str(broken))
    broken.write_text('name = "x"\ntasks = [1]\n')
    with pytest.raises(RecipeError, match="tasks is not a list of tables"):
        load_suite(str(broken))
    broken.write_text('[[tasks]]\nname = "x"\n')
    with pytest.raises(RecipeError, match=r"tasks.x: no data: set files or source"):
        load_suite(str(broken))
    with pytest.raises(UserError, match="no such file"):
        load_suite(str(tmp_path / "absent.jsonl"))


def test_without_file_or_network_both_remedies_are_named(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    for folder in (None, tmp_path):
        with pytest.raises(UserError) as caught:
            load_problems(task_of("paper-id", "aime24"), folder)
        for part in ("aime24", "--data", "valid.all.parquet", "HuggingFaceH4/aime_2024", "thence[datasets]", "network"):
            assert part in str(caught.value)
    assert "no --data was given" not in str(caught.value) and str(tmp_path) in str(caught.value)
    with pytest.raises(UserError, match="no such folder or file"):
        load_problems(task_of("paper-id", "aime24"), tmp_path / "nowhere")


def test_a_failing_download_names_both_remedies(hub: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hub(MMLU)

    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("cannot reach the hub\nlong trace")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", fails)
    with pytest.raises(
        UserError, match=r"cannot reach the hub\n  remedy: .*valid.mmlu_pro.parquet.*thence\[datasets\]"
    ):
        load_problems(task_of("paper-ood", "mmlu_pro"))


def test_hub_rows_are_bare_problems_and_get_the_suites_system_message(hub: Callable[..., Any]) -> None:
    asked = hub([{"ID": "1", "problem": "Find $1+1$.", "solution": "Add.", "answer": "2"}])
    (problem,) = load_problems(task_of("paper-id", "aime24"))
    assert asked == [("HuggingFaceH4/aime_2024", None, "train")]
    assert [role for role, _ in problem.messages] == ["system", "user"] and problem.answer == "2"
    hub([{"question": "Find all.", "final_answer": ["1", "2"], "subject": "x"}])
    assert load_problems(task_of("paper-id", "olympiad"))[0].answer == "1, 2"
    hub([{"id": 0, "problem": "Half of 284?", "answer": 142.0, "url": "x"}])
    assert load_problems(task_of("paper-id", "amc"))[0].answer == "142"


def test_a_filter_that_fits_nothing_is_explained(data_folder: Path) -> None:
    task = task_of("paper-id", "aime24")
    with pytest.raises(DataError, match="no row has data_source = 'aime26'"):
        load_problems(task.model_copy(update={"filter": {"data_source": "aime26"}}), data_folder)
    with pytest.raises(DataError, match="no column subset"):
        load_problems(task.model_copy(update={"filter": {"subset": "x"}}), data_folder)

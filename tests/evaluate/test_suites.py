"""Suites and the problems they name: files, hub, the embedded world, copies, options, prompts, errors."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from thence.errors import DataError, RecipeError, UserError
from thence.evaluate.problems import LETTERS, load_problems
from thence.evaluate.suites import Task, load_suite, shipped_suites

SYSTEM = "Think in tags, then box the answer."
AIME = {"Find $1+1$.": "2", "Find $2+2$.": "4"}
AMC = {"Half of 284?": "142.0"}
ARC = ("Which effect?\n\nA) Density will decrease.\nB) Years will become longer.\n", "B")


def luffy_row(source: str, text: str, answer: str, index: int) -> dict[str, Any]:
    return {
        "data_source": source,
        "prompt": [{"content": SYSTEM, "role": "system"}, {"content": text, "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": index, "split": "default"},
        "__index_level_0__": index,
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with small files of the same layout as the real ones."""
    rows = [luffy_row("math", "What is $x$?", r"\frac{1}{2}", 0)]
    rows += [luffy_row("aime", text, answer, i) for i in range(32) for text, answer in AIME.items()]
    rows += [luffy_row("amc", text, answer, i) for i in range(32) for text, answer in AMC.items()]
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "valid.all.parquet")
    pq.write_table(pa.Table.from_pylist([luffy_row("arc_c", *ARC, 0)]), folder / "valid.arc_c.parquet")
    lines = [
        {"question": "48 clips, then half of it. How many?", "answer": "48/2=<<48/2=24>>24\n#### 1,072"},
        {"question": "Two and two?", "answer": "2+2=4\n#### 4"},
    ]
    write_lines(folder / "test.jsonl", lines)
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Any, ...]]]:
    """Play the package datasets with these rows; returns the list of what was asked for."""

    def play(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        asked: list[tuple[Any, ...]] = []

        class Rows(list):
            @property
            def column_names(self) -> list[str]:
                return list(self[0])

            def select_columns(self, names: list[str]) -> Rows:
                return Rows({name: row[name] for name in names} for row in self)

        def load_dataset(name: str, config: str | None = None, *, split: str) -> Rows:
            asked.append((name, config, split))
            return Rows(rows)

        module = types.ModuleType("datasets")
        module.load_dataset = load_dataset  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", module)
        return asked

    return play


def task_of(suite: str, name: str, **overrides: Any) -> Task:
    return next(task for task in load_suite(suite, overrides).tasks if task.name == name)


# The shipped suites.


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


# Reading.


def test_copies_of_a_problem_are_one_problem(data: Path) -> None:
    found = load_problems(task_of("paper-id", "aime24"), data)
    assert [(problem.text, problem.answer) for problem in found] == list(AIME.items())
    assert found[0].messages == (("system", SYSTEM), ("user", "Find $1+1$."))
    assert found[0].source == f"{data}/valid.all.parquet:2"
    assert load_problems(task_of("paper-id", "amc"), data)[0].answer == "142.0"
    assert len(load_problems(task_of("paper-id", "math500"), data)) == 1


def test_the_same_problem_with_two_answers_is_refused(tmp_path: Path) -> None:
    rows = [
        {"question": "2+2?", "answer": "4"},
        {"question": "3+3?", "answer": "6"},
        {"question": "2+2?", "answer": "5"},
    ]
    file = write_lines(tmp_path / "own.jsonl", rows)
    with pytest.raises(DataError, match=r"own.jsonl:3: the same problem as .*own.jsonl:1, with the answer '5'"):
        load_problems(load_suite(str(file)).tasks[0])


def test_gsm8k_answers_stand_after_the_mark(data: Path) -> None:
    task = load_suite("gsm8k").tasks[0]
    found = load_problems(task, data)
    assert [problem.answer for problem in found] == ["1072", "4"]
    assert found[1].text == "Two and two?"
    assert found[1].messages[0][0] == "user" and "\\boxed{}" in found[1].messages[0][1]
    assert load_problems(task, data / "test.jsonl") == found  # the file itself may be named


def test_files_are_also_found_in_the_folder_of_their_data_set(data: Path) -> None:
    (data / "openr1_eval").mkdir()
    (data / "valid.all.parquet").rename(data / "openr1_eval" / "valid.all.parquet")
    assert len(load_problems(task_of("paper-id", "aime24"), data)) == 2


def test_limit_takes_the_first_problems(data: Path) -> None:
    assert [p.text for p in load_problems(task_of("paper-id", "aime24"), data, limit=1)] == ["Find $1+1$."]
    assert len(load_problems(task_of("embedded", "chain-ood"), limit=3)) == 3
    with pytest.raises(UserError, match="limit of 0"):
        load_problems(task_of("embedded", "chain-ood"), limit=0)


def test_the_embedded_world_is_asked_as_it_is() -> None:
    from thence.verify import Verdict, load_reward

    found = load_problems(task_of("embedded", "chain-test", problems=40))
    again = load_problems(task_of("embedded", "chain-test", problems=40, seed=7))
    assert found == again and len({problem.key for problem in found}) == 40  # the sampling seed changes no problem
    assert all(p.plain and p.messages == (("user", p.text),) for p in found)
    other = load_problems(task_of("embedded", "chain-test", problems=40, data_seed=7))
    assert {p.key for p in other} != {p.key for p in found}
    with load_reward(task_of("embedded", "chain-test").grader) as grader:
        grades = grader.grade_many([p.text for p in found], [f"#{p.answer}" for p in found], [p.answer for p in found])
    assert {grade.verdict for grade in grades} == {Verdict.RIGHT}


def test_keys_follow_from_task_and_text_alone(data: Path, tmp_path: Path) -> None:
    task = task_of("paper-id", "aime24")
    keys = [problem.key for problem in load_problems(task, data)]
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in keys)
    for changes in ({"system": ""}, {"template": "boxed"}, {"seed": 3}, {"samples": 4}, {"temperature": 1.0}):
        assert [p.key for p in load_problems(task.model_copy(update=changes), data)] == keys
    other = load_problems(task.model_copy(update={"name": "other"}), data)
    assert not {problem.key for problem in other} & set(keys)


# Multiple choice.

MMLU = [
    {"question": f"Question {i}?", "options": ["one", "two", "three", "four"], "answer": "C", "answer_index": 2}
    for i in range(40)
]


def test_stored_options_are_left_as_they_are(data: Path) -> None:
    (problem,) = load_problems(task_of("paper-ood", "arc_c"), data)
    assert problem.messages[-1] == ("user", ARC[0])
    assert (problem.answer, problem.options) == ("B", ())


def test_options_are_shuffled_by_their_own_seed(hub: Callable[..., Any], tmp_path: Path) -> None:
    asked = hub(MMLU)
    task = task_of("paper-ood", "mmlu_pro")
    found = load_problems(task, tmp_path)
    assert asked == [("TIGER-Lab/MMLU-Pro", None, "test")]
    assert all(problem.options[LETTERS.index(problem.answer)] == "three" for problem in found)
    assert {problem.answer for problem in found} == set("ABCD")
    assert "\n\nA) " in found[0].text and found[0].messages[-1] == ("user", found[0].text)
    assert load_problems(task.model_copy(update={"seed": 5}), tmp_path) == found
    other = load_problems(task.model_copy(update={"data_seed": 5}), tmp_path)
    assert [problem.options for problem in other] != [problem.options for problem in found]
    assert [problem.key for problem in other] == [problem.key for problem in found]
    plain = load_problems(task.model_copy(update={"shuffle_options": False}), tmp_path)
    assert {(problem.options, problem.answer) for problem in plain} == {(("one", "two", "three", "four"), "C")}


def test_gpqa_and_arc_columns_become_options(hub: Callable[..., Any], tmp_path: Path) -> None:
    wrongs = {f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}
    asked = hub([{"Question": "Q?", "Correct Answer": " right ", **wrongs, "Record ID": "x"}])
    (problem,) = load_problems(task_of("paper-ood", "gpqa_diamond"), tmp_path)
    assert asked == [("Idavidrein/gpqa", "gpqa_diamond", "train")]
    assert sorted(problem.options) == ["right", "wrong 1", "wrong 2", "wrong 3"]
    assert problem.options[LETTERS.index(problem.answer)] == "right"
    choices = {"text": ["one", "two", "three"], "label": ["1", "2", "3"]}
    hub([{"id": "x", "question": "Q?", "choices": choices, "answerKey": "3"}])
    (problem,) = load_problems(task_of("paper-ood", "arc_c"), tmp_path)
    assert problem.options[LETTERS.index(problem.answer)] == "three"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Q?", "options": ["a", "b"], "answer": "C"}, "own.jsonl:1: answer: 'C' names none"),
        ({"question": "Q?", "options": ["a"], "answer": "A"}, "own.jsonl:1: options: not a list of 2 to 26"),
        ({"question": "Q?", "options": ["a", None], "answer": "A"}, "an option without a text"),
        ({"question": " ", "options": ["a", "b"], "answer": "A"}, "own.jsonl:1: question: missing or empty"),
        ({"question": "Q?", "answer": None}, "own.jsonl:1: answer: missing or null"),
        ({"messages": [{"role": "user", "content": "Q?"}]}, "own.jsonl:1: answer: no answer to grade with"),
        ({"query": "Q?"}, "no layout fits the columns query"),
    ],
)
def test_rows_that_cannot_be_used_are_explained(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    file = write_lines(tmp_path / "own.jsonl", [row])
    with pytest.raises(DataError, match=message):
        load_problems(load_suite(str(file)).tasks[0])


# Prompts.


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({}, [("system", SYSTEM), ("user", "Find $1+1$.")]),
        ({"system": ""}, [("user", "Find $1+1$.")]),
        ({"template": "question"}, [("system", "Be brief."), ("user", "Find $1+1$.")]),
        ({"template": "Q: {question} A:", "system": None}, [("user", "Q: Find $1+1$. A:")]),
        ({"template": "Q: {question} A:", "system": ""}, [("user", "Q: Find $1+1$. A:")]),
    ],
)
def test_templates_and_system_messages(data: Path, changes: dict[str, Any], messages: list[tuple[str, str]]) -> None:
    task = task_of("paper-id", "aime24", system="Be brief.").model_copy(update=changes)
    problem = load_problems(task, data)[0]
    assert list(problem.messages) == messages and not problem.plain
    assert problem.text == "Find $1+1$."


def test_a_plain_template_is_text_without_a_system_message(data: Path) -> None:
    problem = load_problems(task_of("paper-id", "aime24", template="steps", system=""), data)[0]
    assert problem.plain
    assert problem.messages == (("user", "User: Find $1+1$.\nAnswer: Let's think step by step.\n"),)
    with pytest.raises(RecipeError, match="plain template has no system message"):
        task_of("paper-id", "aime24", template="steps")


def test_a_template_may_place_the_options(hub: Callable[..., Any], tmp_path: Path) -> None:
    hub([{"question": "Is {options} a word?", "options": ["yes", "no"], "answer_index": 1}])
    changes = {"template": "{question}\n--\n{options}\n--\nLetter:", "shuffle_options": False, "system": None}
    (problem,) = load_problems(task_of("paper-ood", "mmlu_pro").model_copy(update=changes), tmp_path)
    assert problem.messages == (("user", "Is {options} a word?\n--\nA) yes\nB) no\n--\nLetter:"),)


# Own suites and overrides.

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


# Without data.


def test_without_file_or_network_both_remedies_are_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_a_filter_that_fits_nothing_is_explained(data: Path) -> None:
    task = task_of("paper-id", "aime24")
    with pytest.raises(DataError, match="no row has data_source = 'aime26'"):
        load_problems(task.model_copy(update={"filter": {"data_source": "aime26"}}), data)
    with pytest.raises(DataError, match="no column subset"):
        load_problems(task.model_copy(update={"filter": {"subset": "x"}}), data)

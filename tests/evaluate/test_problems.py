"""Problems that suites name: copies, keys, options, prompts, the embedded world."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.suite_files import AIME, ARC, MMLU, SYSTEM, task_of, write_lines
from thence.errors import DataError, RecipeError, UserError
from thence.evaluate.problems import LETTERS, load_problems
from thence.evaluate.suites import load_suite


def test_copies_of_a_problem_are_one_problem(data_folder: Path) -> None:
    found = load_problems(task_of("paper-id", "aime24"), data_folder)
    assert [(problem.text, problem.answer) for problem in found] == list(AIME.items())
    assert found[0].messages == (("system", SYSTEM), ("user", "Find $1+1$."))
    assert found[0].source == f"{data_folder}/valid.all.parquet:2"
    assert load_problems(task_of("paper-id", "amc"), data_folder)[0].answer == "142.0"
    assert len(load_problems(task_of("paper-id", "math500"), data_folder)) == 1


def test_the_same_problem_with_two_answers_is_refused(tmp_path: Path) -> None:
    rows = [
        {"question": "2+2?", "answer": "4"},
        {"question": "3+3?", "answer": "6"},
        {"question": "2+2?", "answer": "5"},
    ]
    file = write_lines(tmp_path / "own.jsonl", rows)
    with pytest.raises(DataError, match=r"own.jsonl:3: the same problem as .*own.jsonl:1, with the answer '5'"):
        load_problems(load_suite(str(file)).tasks[0])


def test_gsm8k_answers_stand_after_the_mark(data_folder: Path) -> None:
    task = load_suite("gsm8k").tasks[0]
    found = load_problems(task, data_folder)
    assert [problem.answer for problem in found] == ["1072", "4"]
    assert found[1].text == "Two and two?"
    assert found[1].messages[0][0] == "user" and "\\boxed{}" in found[1].messages[0][1]
    assert load_problems(task, data_folder / "test.jsonl") == found  # the file itself may be named


def test_files_are_also_found_in_the_folder_of_their_data_set(data_folder: Path) -> None:
    (data_folder / "openr1_eval").mkdir()
    (data_folder / "valid.all.parquet").rename(data_folder / "openr1_eval" / "valid.all.parquet")
    assert len(load_problems(task_of("paper-id", "aime24"), data_folder)) == 2


def test_limit_takes_the_first_problems(data_folder: Path) -> None:
    assert [p.text for p in load_problems(task_of("paper-id", "aime24"), data_folder, limit=1)] == ["Find $1+1$."]
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


def test_keys_follow_from_task_and_text_alone(data_folder: Path, tmp_path: Path) -> None:
    task = task_of("paper-id", "aime24")
    keys = [problem.key for problem in load_problems(task, data_folder)]
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in keys)
    for changes in ({"system": ""}, {"template": "boxed"}, {"seed": 3}, {"samples": 4}, {"temperature": 1.0}):
        assert [p.key for p in load_problems(task.model_copy(update=changes), data_folder)] == keys
    other = load_problems(task.model_copy(update={"name": "other"}), data_folder)
    assert not {problem.key for problem in other} & set(keys)


def test_stored_options_are_left_as_they_are(data_folder: Path) -> None:
    (problem,) = load_problems(task_of("paper-ood", "arc_c"), data_folder)
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
def test_templates_and_system_messages(
    data_folder: Path, changes: dict[str, Any], messages: list[tuple[str, str]]
) -> None:
    task = task_of("paper-id", "aime24", system="Be brief.").model_copy(update=changes)
    problem = load_problems(task, data_folder)[0]
    assert list(problem.messages) == messages and not problem.plain
    assert problem.text == "Find $1+1$."


def test_a_plain_template_is_text_without_a_system_message(data_folder: Path) -> None:
    problem = load_problems(task_of("paper-id", "aime24", template="steps", system=""), data_folder)[0]
    assert problem.plain
    assert problem.messages == (("user", "User: Find $1+1$.\nAnswer: Let's think step by step.\n"),)
    with pytest.raises(RecipeError, match="plain template has no system message"):
        task_of("paper-id", "aime24", template="steps")


def test_a_template_may_place_the_options(hub: Callable[..., Any], tmp_path: Path) -> None:
    hub([{"question": "Is {options} a word?", "options": ["yes", "no"], "answer_index": 1}])
    changes = {"template": "{question}\n--\n{options}\n--\nLetter:", "shuffle_options": False, "system": None}
    (problem,) = load_problems(task_of("paper-ood", "mmlu_pro").model_copy(update=changes), tmp_path)
    assert problem.messages == (("user", "Is {options} a word?\n--\nA) yes\nB) no\n--\nLetter:"),)

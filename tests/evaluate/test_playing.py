"""`thence eval` with an environment of one's own: rollouts of several turns, which it scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from thence.cli import main
from thence.errors import RecipeError
from thence.evaluate.problems import load_problems
from thence.evaluate.store import Store
from thence.evaluate.suites import load_suite
from thence.evaluate.summary import summarise

SHOP = """
class Shop:
    '''Answers each turn with the row's price, and pays for as many turns as the row asks for.'''

    right_from = 1.0

    def reset(self, row):
        self.row, self.turns = row, 0
        return None

    def step(self, text):
        self.turns += 1
        if self.row.get("fails") and self.turns == 2:
            raise ValueError("sold out")
        done = self.turns == self.row["wanted"]
        return (None if done else f"={self.row['price']};"), float(done), done
"""
EVAL = ["eval", "world:chain/rich", "--suite", "tasks.jsonl", "--environment", "shop.py:Shop", "--max-tokens", "150"]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the environment and the data, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop.py").write_text(SHOP)
    write_tasks(tmp_path, [{"wanted": 1 + i % 3, "price": f"{i:02d}"} for i in range(6)])
    return tmp_path


def write_tasks(folder: Path, columns: list[dict[str, Any]]) -> None:
    rows = [{"prompt": f"{i + 3}+4?", "answer": f"{i + 7:02d}", **more} for i, more in enumerate(columns)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def transcripts(folder: str) -> dict[Any, Any]:
    return {sample.place: sample.turns for sample in Store(Path(folder)).samples("tasks")}


def test_the_environment_answers_every_turn_and_gives_the_scores(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*EVAL, "--samples", "2", "--set", "environment.max_turns=2", "--folder", "e"]) == 0
    assert "graded by shop.py:Shop" in " ".join(capsys.readouterr().out.split())
    samples = {sample.place: sample for sample in Store(shop / "e").samples("tasks")}
    assert len(samples) == 12
    for sample in samples.values():
        row = int(sample.question.partition("+")[0]) - 3
        turns = 1 + row % 3
        said = [text for who, text in sample.turns if who == "environment"]
        assert said == [f"={row:02d};"] * min(turns - 1, 2)
        assert sum(who == "policy" for who, _ in sample.turns) == min(turns, 2)
        assert sample.finish == ("stop" if turns <= 2 else "turns")
        assert sample.score is not None and sample.score.verdict == ("right" if turns <= 2 else "wrong")
        assert all(text in sample.text for text in said)
    (task,) = summarise(Store(shop / "e")).tasks
    assert task.avg is not None and task.avg.value == pytest.approx(2 / 3)


def test_a_rollout_does_not_depend_on_those_beside_it_or_on_when_it_was_played(shop: Path) -> None:
    assert main([*EVAL, "--samples", "2", "--folder", "whole"]) == 0
    assert main([*EVAL, "--samples", "2", "--rows", "5", "--folder", "fives"]) == 0
    assert transcripts("fives") == transcripts("whole")
    file = next((shop / "whole" / "samples").iterdir())
    lines = file.read_text().splitlines(keepends=True)
    before = transcripts("whole")
    file.write_text("".join(lines[:5]))
    assert main([*EVAL, "--samples", "2", "--folder", "whole"]) == 0
    assert transcripts("whole") == before


def test_an_environment_that_fails_names_the_row_and_keeps_what_was_played(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tasks(shop, [{"wanted": 2, "price": "11", "fails": i == 4} for i in range(6)])
    assert main([*EVAL, "--rows", "2", "--folder", "e"]) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert "shop.py" in said and "ValueError on " in said and "tasks.jsonl:5" in said and "sold out" in said
    assert 'on_error = "unknown"' in said
    kept = transcripts("e")
    assert 2 <= len(kept) <= 4
    unknown = ["--set", "environment.on_error=unknown"]
    assert main([*EVAL, *unknown, "--rows", "2", "--folder", "e"]) != 0  # other settings than those it was begun with
    assert main([*EVAL, *unknown, "--folder", "other"]) == 0
    verdicts = [sample.score.verdict for sample in Store(shop / "other").samples("tasks") if sample.score]
    assert sorted(verdicts) == ["right"] * 5 + ["unknown"]


def test_rows_of_one_text_are_problems_of_their_own_where_the_environment_can_tell_them_apart(shop: Path) -> None:
    rows = [{"prompt": "3+4?", "wanted": 1 + i % 2, "price": "11"} for i in range(4)]  # no answer: it needs none
    (shop / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_suite("tasks.jsonl", {"environment": "shop.py:Shop"}).tasks[0]
    problems = load_problems(task)
    assert [json.loads(problem.columns or "")["wanted"] for problem in problems] == [1, 2]
    assert len({problem.key for problem in problems}) == 2


def test_your_own_grader_reads_the_other_columns(shop: Path) -> None:
    (shop / "own.py").write_text(
        "def pays(prompt, response, answer, columns):\n    return float(columns['wanted'] == 2)\n"
    )
    grader = ["--grader", "own.py:pays"]
    assert (
        main(["eval", "world:chain/rich", "--suite", "tasks.jsonl", *grader, "--max-tokens", "8", "--folder", "e"]) == 0
    )
    found = {
        sample.question: Store(shop / "e").graded("tasks", "own.py:pays")[sample.place].score
        for sample in Store(shop / "e").samples("tasks")
    }
    assert found == {f"{i + 3}+4?": float(i % 3 == 1) for i in range(6)}


def test_scores_cannot_be_given_again_and_other_graders_can(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*EVAL, "--folder", "e"]) == 0
    assert main(["eval", "--regrade", "e"]) != 0
    assert "scored these responses while they were sampled" in capsys.readouterr().err
    assert main(["eval", "--regrade", "e", "--grader", "exact"]) == 0


def test_a_server_cannot_play(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--endpoint", "http://localhost:1/v1", *EVAL[2:]]) != 0
    assert "--endpoint: the task tasks has an environment" in " ".join(capsys.readouterr().err.split())


def test_an_environment_stands_in_a_suite_or_comes_by_flags(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(
        'name = "own"\n[defaults]\nsource = "world:chain"\nproblems = 3\ngrader = "exact"\n'
        '[[tasks]]\nname = "v1.5"\n[[tasks]]\nname = "b"\n'
    )
    given = {"environment": "shop.py:Shop", "environment.max-turns": "3", "v1.5.environment.score": "last"}
    first, second = load_suite(str(file), given).tasks
    assert first.environment is not None and second.environment is not None
    assert (first.environment.max_turns, first.environment.score) == (3, "last")
    assert (second.environment.max_turns, second.environment.score) == (3, "sum")
    assert first.grader == second.grader == "shop.py:Shop"
    only = load_suite(str(file), {"v1.5.environment": "shop.py:Shop"}).tasks
    assert [task.environment is None for task in only] == [False, True] and only[1].grader == "exact"
    with pytest.raises(RecipeError, match="grader and environment both give scores: leave grader out"):
        load_suite(str(file), {"grader": "math", "environment": "shop.py:Shop"})
    with pytest.raises(RecipeError, match="choices asks for the letter of one answer"):
        load_suite(str(file), {"choices": "true", "environment": "shop.py:Shop"})
    with pytest.raises(RecipeError) as wrong:
        load_suite(str(file), {"environment": "shop.py:Shop", "environment.max_turns": "0"})
    assert wrong.value.field == "environment.max_turns"


def test_scores_of_a_changed_environment_are_not_mixed_or_renamed(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*EVAL, "--folder", "e"]) == 0
    (shop / "shop.py").write_text(SHOP.replace("float(done)", "1.0 - float(done)"))
    for more in ([], ["--samples", "2"]):
        assert main([*EVAL, *more, "--folder", "e"]) != 0
        assert "shop.py:Shop has changed since it scored the samples here" in capsys.readouterr().err
    assert main([*EVAL, "--folder", "other"]) == 0
    assert main(["eval", "--compare", "e", "other"]) == 0
    assert "grader's version" in capsys.readouterr().out


def test_a_threshold_that_is_set_later_judges_the_scores_that_are_there(shop: Path) -> None:
    (shop / "shop.py").write_text(SHOP.replace("float(done)", "0.7 * float(done)"))
    assert main([*EVAL, "--folder", "e"]) == 0
    store = Store(shop / "e")
    assert {line.verdict for line in store.graded("tasks", "shop.py:Shop").values()} == {"wrong"}
    assert main([*EVAL, "--set", "right_from=0.5", "--folder", "e"]) == 0
    assert {line.verdict for line in store.graded("tasks", "shop.py:Shop").values()} == {"right"}
    (task,) = summarise(store).tasks
    assert task.versions[0].endswith(", right from 0.5")


def test_rows_whose_other_columns_have_changed_are_refused(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*EVAL, "--folder", "e"]) == 0
    write_tasks(shop, [{"wanted": 1, "price": f"{i:02d}"} for i in range(6)])
    assert main([*EVAL, "--folder", "e"]) != 0
    assert "has another prompt, answer or other columns" in " ".join(capsys.readouterr().err.split())


def test_a_majority_is_not_counted_where_nobody_names_answers(shop: Path) -> None:
    assert main([*EVAL, "--samples", "2", "--folder", "e"]) == 0
    (task,) = summarise(Store(shop / "e")).tasks
    assert task.avg is not None and task.majority is None


def test_how_rollouts_ended_is_said_in_words(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*EVAL, "--set", "environment.max_turns=1", "--folder", "e"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "rollouts that did not end by themselves or were cut: ended by the limit of turns 4" in said
    assert "as the server calls it" not in said
    assert main([*EVAL, "--set", "environment.max_observation_tokens=1", "--folder", "small"]) == 0
    (task,) = summarise(Store(shop / "small")).tasks
    assert task.truncated == 4 and not task.other_ends


def test_graders_of_texts_read_the_policys_words_alone(shop: Path) -> None:
    (shop / "shop.py").write_text(SHOP.replace("f\"={self.row['price']};\"", "f\"#{self.row['answer']}\""))
    assert main([*EVAL, "--folder", "e"]) == 0
    (shop / "own.py").write_text("def told(prompt, response, answer):\n    return float('#' + answer in response)\n")
    store = Store(shop / "e")
    expected = {}
    for sample in store.samples("tasks"):
        policy = "\n".join(text for who, text in sample.turns if who == "policy")
        assert (f"#{sample.answer}" in sample.text) or len(sample.turns) == 1
        expected[sample.place] = float(f"#{sample.answer}" in policy)
    assert main(["eval", "--regrade", "e", "--grader", "own.py:told"]) == 0
    assert {place: line.score for place, line in store.graded("tasks", "own.py:told").items()} == expected


def test_a_suite_may_have_tasks_with_and_without_an_environment(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shop / "both.toml").write_text(
        '[defaults]\nfiles = ["tasks.jsonl"]\ngrader = "exact"\nmax_tokens = 100\n'
        '[[tasks]]\nname = "played"\nenvironment = { path = "shop.py:Shop", max_turns = 2 }\n'
        '[[tasks]]\nname = "plain"\n'
    )
    ask = ["eval", "world:chain/rich", "--suite", "both.toml", "--set", "plain.grader=exact", "--folder", "e"]
    assert main([*ask, "--set", "environment.max_turns=3"]) == 0
    tasks = Store(shop / "e").settings().tasks
    assert tasks["played"].environment is not None and tasks["played"].environment.max_turns == 3
    assert tasks["plain"].environment is None and tasks["plain"].grader == "exact"
    before = Store(shop / "e").grades("played")
    assert main(["eval", "--regrade", "e"]) == 0  # the other task is graded again
    assert Store(shop / "e").grades("played") == before and len(Store(shop / "e").grades("plain")) == 12
    capsys.readouterr()
    assert main(["eval", "--regrade", "e", "--set", "right_from=0.5"]) != 0
    assert "--set: --regrade samples nothing and does not read it" in " ".join(capsys.readouterr().err.split())

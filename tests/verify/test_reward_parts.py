"""Rewards in parts, in batches, with the row's columns, and several at once with weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from thence.errors import UserError
from thence.verify import Grader, Verdict, load_reward
from thence.verify.verdict import Grade, right, unknown, wrong
from thence.verify.weighted import WeightedGrader

PLAIN, ROW = "prompt, response, answer", "prompt, response, answer, columns"


def written(folder: Path, value: str, parameters: str = PLAIN, after: str = "") -> str:
    file = folder / "own.py"
    file.write_text(f"def own({parameters}):\n    return {value}\n{after}\n")
    return f"{file}:own"


def graded(spec: str, responses: list[str], columns: list[str] | None = None, seconds: float = 10.0) -> list[Grade]:
    with load_reward(spec, seconds=seconds) as grader:
        return grader.grade_many(["p"] * len(responses), responses, ["1"] * len(responses), columns)


# A dict of components.


def test_the_score_of_a_dict_is_its_sum_and_its_parts_are_kept(tmp_path: Path) -> None:
    spec = written(tmp_path, "{'right': float(response == '1'), 'length': -0.1 * len(response)}")
    first, second = graded(spec, ["1", "22"])
    assert first.score == pytest.approx(0.9) and first.components == (("right", 1.0), ("length", -0.1))
    assert second.score == pytest.approx(-0.2) and second.verdict is Verdict.GRADED


def test_a_key_reward_is_the_score_itself(tmp_path: Path) -> None:
    (only,) = graded(written(tmp_path, "{'reward': 1, 'format': 0.25}"), ["x"])
    assert (only.score, only.verdict, only.components) == (1.0, Verdict.RIGHT, (("format", 0.25),))


def test_a_part_that_nobody_can_tell_makes_the_score_unknown(tmp_path: Path) -> None:
    (only,) = graded(written(tmp_path, "{'a': 1.0, 'b': None}"), ["x"])
    assert only.verdict is Verdict.UNKNOWN and only.components == ()


@pytest.mark.parametrize("value", ["{}", "{'a': 'text'}", "{1: 1.0}", "{'a': float('nan')}", "[1.0, 2.0]"])
def test_what_is_no_dict_of_numbers_is_refused_and_shown(value: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"returned .* on response 1 of the batch"):
        graded(written(tmp_path, value), ["x"])


# Lists at once.

BATCHED = "own.batched = True"


def test_a_batched_function_gets_lists_and_is_called_once(tmp_path: Path) -> None:
    spec = written(tmp_path, "[len(r) / len(response) for r in response]", after=BATCHED)
    assert [grade.score for grade in graded(spec, ["a", "bb"])] == [0.5, 1.0]
    assert graded(spec, []) == []


def test_a_batched_function_may_give_dicts_and_none(tmp_path: Path) -> None:
    first, second = graded(written(tmp_path, "[{'a': 1.0, 'b': 2.0}, None]", after=BATCHED), ["a", "b"])
    assert first.components == (("a", 1.0), ("b", 2.0)) and second.verdict is Verdict.UNKNOWN


@pytest.mark.parametrize("value", ["[1.0]", "1.0", "{'a': 1.0}", "'ab'"])
def test_a_batched_function_that_gives_another_number_of_scores_is_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a list of 2 scores"):
        graded(written(tmp_path, value, after=BATCHED), ["a", "b"])


def test_a_wrong_score_of_a_batch_names_its_response(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="returned 'x' on response 2 of the batch"):
        graded(written(tmp_path, "[1.0, 'x']", after=BATCHED), ["a", "b"])


def test_a_batch_that_takes_too_long_is_unknown_as_a_whole(tmp_path: Path) -> None:
    spec = written(tmp_path, "__import__('time').sleep(60)", after=BATCHED)
    grades = graded(spec, ["a", "b"], seconds=0.1)
    assert [grade.verdict for grade in grades] == [Verdict.UNKNOWN] * 2 and "time limit" in grades[0].reason


# The row's columns.


def test_the_other_columns_of_the_row_are_handed_over(tmp_path: Path) -> None:
    spec = written(tmp_path, "columns.get('level', 0)", ROW)
    assert [grade.score for grade in graded(spec, ["a", "b"], [json.dumps({"level": 3}), ""])] == [3.0, 0.0]
    batched = written(tmp_path, "[c.get('level', 0) for c in columns]", ROW, BATCHED)
    assert [grade.score for grade in graded(batched, ["a", "b"], ['{"level": 3}', ""])] == [3.0, 0.0]


def test_where_columns_are_not_known_a_function_that_takes_them_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="takes the row's columns, and they are not kept here"):
        graded(written(tmp_path, "1.0", ROW), ["a"])


# Several rewards.


class Fixed(Grader):
    """Gives these grades; notes that it was closed."""

    def __init__(self, *grades: Grade):
        self.grades, self.closed = grades, False

    def grade_many(self, prompts, responses, answers, columns=None):  # type: ignore[no-untyped-def]
        return list(self.grades)

    def close(self) -> None:
        self.closed = True


def test_several_rewards_are_a_weighted_sum_and_the_first_says_who_is_right() -> None:
    style = Fixed(
        Grade(Verdict.GRADED, 0.5, components=(("brief", 0.5),)), Grade(Verdict.GRADED, -1.0), unknown("late")
    )
    with WeightedGrader({"math": (1.0, Fixed(right("7"), wrong("8"), right("9"))), "style": (0.2, style)}) as both:
        first, second, third = both.grade_many(["p"] * 3, ["r"] * 3, ["7"] * 3)
    assert first.score == pytest.approx(1.1) and first.verdict is Verdict.RIGHT and first.extracted == "7"
    assert first.components == (("math", 1.0), ("style", 0.5), ("style/brief", 0.5))
    assert second.score == pytest.approx(-0.2) and second.verdict is Verdict.WRONG
    assert third.verdict is Verdict.UNKNOWN and third.reason == "style: late"
    assert style.closed

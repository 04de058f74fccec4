"""Rewards by name, and reward functions of your own that are loaded from a file or a module."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verify.verdicts import RIGHT, WRONG
from thence.errors import UserError
from thence.verify import count, load_function, load_reward

# Rewards by name ----------------------------------------------------------------------------------------------------

OWN = """
def length(prompt, response, answer):
    return None if answer is None else 0.25 * len(response) - 0.5

def broken(prompt, response, answer):
    return 1 / (len(response) - 3)

def nan(prompt, response, answer):
    return float("nan")

def text(prompt, response, answer):
    return "1.0"

def two(prompt, response):
    return 1.0

number = 3
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "my_rewards.py"
    file.write_text(OWN)
    return file


def test_rewards_by_name() -> None:
    with load_reward("exact") as grader:
        assert [g.score for g in grader.grade_many(["p", "p"], ["#12", "#13"], ["12", "12"])] == [1.0, 0.0]
    response = r"so \boxed{4}"
    with load_reward("math", seconds=5, workers=1) as grader:
        assert grader.grade_many(["p"], [response], ["4"])[0].verdict is RIGHT
    with load_reward("math-after-think", seconds=5, workers=1) as grader:
        assert grader.grade_many(["p"], [response], ["4"])[0].verdict is WRONG


def test_an_own_function_gives_real_scores_and_none_is_unknown(own: Path) -> None:
    with load_reward(f"{own}:length") as grader:
        grades = grader.grade_many(["p"] * 3, ["aaaa", "a", "aaaa"], ["x", "x", None])
    assert [grade.score for grade in grades] == [0.5, -0.25, 0.0]
    assert count(grades) == {"right": 0, "wrong": 0, "graded": 2, "unknown": 1}


def test_an_own_function_by_module(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(own.parent)
    assert load_function("my_rewards:length")("p", "aaaa", "x") == 0.5


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("maths", "no reward is called 'maths'[\\s\\S]*math-after-think"),
        ("{own}:lenght", "has no 'lenght'[\\s\\S]*def reward\\("),
        ("{own}:number", "'number' in .* is not a function"),
        ("{own}:two", "cannot be called with a prompt, a response and an answer"),
        ("{own}x.py:length", "there is no file"),
        ("{broken}:f", "cannot be imported: NameError[\\s\\S]*broken.py"),
        ("no_such_package.rewards:f", "ModuleNotFoundError[\\s\\S]*install or fix"),
        ("here:f", "ModuleNotFoundError[\\s\\S]*write here.py:f"),
    ],
)
def test_an_own_function_that_cannot_be_loaded_is_explained(
    spec: str, message: str, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = own.with_name("broken.py")
    broken.write_text("nonsense")
    own.with_name("here.py").write_text("def f(prompt, response, answer): return 1.0")
    monkeypatch.chdir(own.parent)
    with pytest.raises(UserError, match=message):
        load_reward(spec.format(own=own, broken=broken))


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [("broken", 2, "ZeroDivisionError"), ("nan", 1, "returned nan"), ("text", 1, "returned '1.0'")],
)
def test_an_own_function_that_fails_names_itself_and_the_row(own: Path, name: str, row: int, message: str) -> None:
    grader = load_reward(f"{own}:{name}")
    with pytest.raises(UserError) as caught:
        grader.grade_many(["prompt 1", "prompt 2"], ["aa", "aaa"], ["1", "1"])
    for part in (f"{own}:{name}", message, f"response {row} of the batch", f"'prompt {row}'", "remedy: "):
        assert part in str(caught.value)


def test_columns_of_different_length_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="zip"):
        load_reward("exact").grade_many(["p"], ["#1", "#2"], ["1"])

"""Verdicts on answers: math, exact match, and grades that are sent between processes."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.verify.verdicts import RIGHT, UNKNOWN, WRONG, verdict
from thence.data.think import THINK_TAGS
from thence.verify import Grade, GradingPool, Verdict, grade_exact
from thence.verify.math import Rule, graded_part
from thence.verify.verdict import from_plain, reward, to_plain

# Mathematical equality ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "response", "expected"),
    [
        ("142.0", r"\boxed{142}", RIGHT),
        ("C", r"\boxed{C}", RIGHT),
        ("C", r"\boxed{\text{C}}", RIGHT),
        ("C", r"\boxed{B}", WRONG),
        ("2", r"\boxed{2}", RIGHT),
        ("C", "the answer is C) Planetary days will become shorter.", WRONG),
        ("C", r"\boxed{C) Planetary days}", WRONG),
        ("A", "ANSWER: A", WRONG),
        (r"\frac{1}{2}", r"from $x = 7$ we get $x = 3$, so it is \boxed{0.5}", RIGHT),
        ("4", "", WRONG),
        ("", r"\boxed{4}", UNKNOWN),
        (None, r"\boxed{4}", UNKNOWN),
    ],
)
def test_math_verdicts(pool: GradingPool, answer: str | None, response: str, expected: Verdict) -> None:
    assert verdict(pool, response, answer) is expected


def test_the_gold_answer_goes_first(pool: GradingPool) -> None:
    # math-verify reads an interval as the solution of a gold inequality, and not the other way round.
    assert verdict(pool, "$(1,2)$", "1<x<2") is RIGHT
    assert verdict(pool, "$1<x<2$", "(1,2)") is WRONG


def test_after_think_grades_only_what_follows_the_first_closing_tag(pool: GradingPool) -> None:
    rule: Rule = "after_think"
    assert verdict(pool, r"hm, \boxed{5}?</think>So \boxed{4}.", "4", rule) is RIGHT
    assert verdict(pool, r"so \boxed{4}</think>It is \boxed{5}.", "4", rule) is WRONG
    assert verdict(pool, r"<think>cut off at \boxed{4}", "4", rule) is WRONG
    assert verdict(pool, r"a</think>\boxed{4}</think>\boxed{5}", "4", rule) is RIGHT
    assert verdict(pool, r"cut off at \boxed{4}", "4", "plain") is RIGHT  # no thinking that anybody can see
    assert verdict(pool, r"<think>cut off at \boxed{4}", "4", "plain") is WRONG


@given(st.text(), st.text(), st.text())
def test_after_think_part(before: str, part: str, after: str) -> None:
    assume(not any(tags.opens in before for tags in THINK_TAGS))
    assert graded_part(f"{before}<think>\n{part}", "plain") == before
    if "</think>" not in before + part:
        assert graded_part(f"{before}</think>{part}</think>{after}", "after_think") == part


def test_checking_answers_imports_neither_torch_nor_math_verify_here() -> None:
    code = "import sys, thence.verify; sys.exit(len({'torch', 'sympy', 'math_verify'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Exact match, grades ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("a=55b=52c=12#12", RIGHT),
        ("a=55#12$", RIGHT),
        ("a=55# 12 \n", RIGHT),
        ("#99#12", RIGHT),
        ("#12#99", WRONG),
        ("#012", WRONG),
        ("#12x", WRONG),
        ("#", WRONG),
        ("12", WRONG),
    ],
)
def test_exact_match_after_the_last_marker(response: str, expected: Verdict) -> None:
    grade = grade_exact(response, "12")
    assert grade.verdict is expected
    assert reward(grade) == (1.0 if expected is RIGHT else 0.0)


def test_exact_match_tells_a_missing_answer_from_a_wrong_one_and_from_missing_gold() -> None:
    assert grade_exact("12", "12").reason == "no answer given"
    assert grade_exact("#13", "12") == Grade(WRONG, 0.0, "13", "")
    assert grade_exact("#13", None) == Grade(UNKNOWN, 0.0, None, "no gold answer")


@pytest.mark.parametrize("grade", [Grade(RIGHT, 1.0, "4"), Grade(UNKNOWN, 0.0, None, "memory"), Grade(WRONG, -0.5)])
def test_a_grade_survives_being_sent(grade: Grade) -> None:
    assert from_plain(to_plain(grade)) == grade

"""Graders hear what a response says of its answer, and read one answer in many notations."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import ROOT
from tests.verify.answer_cases import CASES
from thence.evaluate.run import grader_version
from thence.verify import GradeRequest, GradingPool, Verdict
from thence.verify.boxed import alike, last_box, normal_form
from thence.verify.claims import denied, find_claim, finished, objection, sides
from thence.verify.notation import tidy, tidy_gold
from thence.verify.quantities import based, quantity, split_unit

sys.path.insert(0, str(ROOT / "benchmarks"))
from answer_forms import digits_of, form_of, scientific
from paraphrase_forms import near_misses, paraphrases

RIGHT, WRONG = Verdict.RIGHT, Verdict.WRONG
GOLDS = ["42", "142.0", "-50", "1.25", "3e8", "2.7778e-6", "\\frac{14}{3}", "90^\\circ", "(6,31,-1)", "(3,4]"]
GOLDS += [
    "1,-2",
    "\\$18.90",
    "$f(x)=2 x$",
    "62.5%",
    "52_8",
    "6 - 5i",
    "3\\sqrt{13}",
    "\\text{east}",
    "1 \\pm \\sqrt{19}",
]
GOLDS += ["(-\\infty, 2) \\cup (3, \\infty)", "\\begin{pmatrix} -2 \\\\ -14 \\end{pmatrix}", "x^3+3x-6", "11,\\! 111"]


@pytest.fixture(scope="module")
def pool() -> Iterator[GradingPool]:
    with GradingPool(workers=1) as pool:
        yield pool


@pytest.mark.parametrize("rule", ["plain", "boxed"])
def test_what_a_careful_person_says(pool: GradingPool, rule) -> None:
    cases = [case for case in CASES if rule == "plain" or "boxed" in case[1]]
    grades = pool.grade_many([GradeRequest(response, gold, rule) for gold, response, _ in cases])
    wrong = [(case, grade) for case, grade in zip(cases, grades, strict=True) if (grade.verdict is RIGHT) != case[2]]
    assert not wrong


def test_paraphrases_are_right_and_near_misses_wrong(pool: GradingPool) -> None:
    written = [
        (gold, one)
        for turn, gold in enumerate(GOLDS)
        for make in (paraphrases, near_misses)
        for one in make(gold, turn)
    ]
    assert len(written) == 6 * len(GOLDS)
    for rule in ("plain", "boxed"):
        grades = pool.grade_many([GradeRequest(one.response, gold, rule) for gold, one in written])
        bad = [(*case, g) for case, g in zip(written, grades, strict=True) if (g.verdict is RIGHT) is not case[1].right]
        assert not bad


def test_the_writer_of_paraphrases_knows_the_forms() -> None:
    kinds = {gold: form_of(gold).kind for gold in GOLDS}
    assert (kinds["3e8"], kinds["(3,4]"], kinds["(6,31,-1)"], kinds["1,-2"]) == (
        "e-notation",
        "interval",
        "tuple",
        "list",
    )
    value = form_of("2.7778e-6").value
    assert value is not None
    assert (scientific(value, "x"), digits_of(value)) == ("2.7778x10^{-6}", "0.0000027778")


@pytest.mark.parametrize("rule", ["plain", "boxed"])
@pytest.mark.parametrize("opens", ["<think>", "<thinking>", "[THINK]", "Well. <think>"])
def test_thinking_that_never_ended_has_no_final_answer(pool: GradingPool, rule, opens: str) -> None:
    texts = [f"{opens}so \\boxed{{7}}", f"{opens}so 7", f"{opens}so $7$"]
    assert {g.verdict for g in pool.grade_many([GradeRequest(text, "7", rule) for text in texts])} == {WRONG}
    assert pool.grade_many([GradeRequest(rf"\boxed{{7}} {opens}or", "7", rule)])[0].verdict is RIGHT


def test_an_answer_that_stands_in_no_box_is_right_and_earns_nothing_under_the_box_rule(pool: GradingPool) -> None:
    texts = [
        "#### 18",
        "Final Answer: 18",
        "**Answer:** 18.",
        "The answer is 19.",
        "She makes 18.",
        "The answer is not 18.",
    ]
    grades = pool.grade_many([GradeRequest(text, "18", "boxed") for text in texts])
    assert [grade.verdict for grade in grades] == [RIGHT, RIGHT, RIGHT, WRONG, WRONG, WRONG]
    assert {grade.score for grade in grades} == {0.0}
    assert grades[0].reason == "not in a box"


def test_several_boxes_stay_one_set_as_in_the_papers_code(pool: GradingPool) -> None:
    texts = [r"\boxed{5} no wait, actually \boxed{7}", r"\boxed{1} and \boxed{7}"]
    assert {grade.verdict for grade in pool.grade_many([GradeRequest(text, "7") for text in texts])} == {WRONG}


def test_a_grade_names_the_version_of_the_rules_and_exact_does_not() -> None:
    assert "rules 2, math-verify" in grader_version("math") and "rules 2" in grader_version("math-boxed")
    assert "rules" not in grader_version("exact")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("1\\,234\\,567", "1234567"),
        ("1\u202f234", "1234"),
        ("1\\,23", "1 23"),
        ("½", "\\frac{1}{2}"),
        ("√2", "\\sqrt{2}"),
        ("3e8", "300000000"),
        ("1.5e-3", "0.0015"),
        ("24e", "24e"),
        ("2e8x", "2e8x"),
        ("4e999", "4\\times 10^{999}"),
        ("2\\text{ or 3}", "2 or 3 "),
        ("5\\text{ cm}", "5\\text{ cm}"),
        ("x_1 = 3", "x_1 = 3"),
    ],
)
def test_notations_become_one(text: str, plain: str) -> None:
    assert tidy(text) == plain


@given(st.text(alphabet="abcxyz 0123456789+-=(){}^_$.\n"))
def test_a_notation_that_is_read_already_does_not_change(text: str) -> None:
    assert "e" in text or tidy(text) == text or "./" in text
    assert tidy(tidy_gold(text)) == tidy_gold(text)


def test_quantities() -> None:
    assert quantity("1 2") is None and quantity("x") is None and quantity("1/0") is None
    assert quantity("1 1/2") == quantity("1\\frac12") == quantity("\\dfrac{3}{2}")
    assert based("42_8") == (34, 8) and based("42_2") is None and based("a_1") is None
    assert based("42\\text{ (base 8)}") == (34, 8) and based("42") is None
    (_, km), (_, cm), (_, none) = split_unit("5\\text{ km}"), split_unit("5 cm"), split_unit("5\\text{ apples}")
    assert km is not None and cm is not None and none is None
    assert (km.kind, km.size / cm.size) == (cm.kind, 100_000)


def test_the_box_rule_keeps_what_makes_a_difference() -> None:
    assert not alike("12", "1 2") and not alike("0.5\\%", "0.5") and not alike("y=5", "x=5")
    assert alike("x=5", "5") and alike("\\dfrac 12", "\\frac{1}{2}") and alike("1 2", "1\\,2")
    assert normal_form("62.5 \\%") == normal_form("62.5%")


def test_reading_a_claim_takes_no_time_on_hostile_text() -> None:
    start = time.process_time()
    for hostile in ("answer is " * 40_000, "\\boxed{" * 30_000, "1\\,234" * 50_000, "\\text{ or " * 30_000):
        for text in (hostile, hostile + "}", "√(" + hostile, hostile + "####" + hostile):
            claim = find_claim(tidy(finished(text)))
            denied(text, "7")
            last_box(text)
            if claim is not None:
                objection(claim, "7")
                sides(claim.text)
    for hostile in ("9" * 100_000, "9," * 50_000, "=" * 100_000, "<think>" * 40_000):
        tidy(hostile), quantity(hostile), based(hostile), split_unit(hostile), finished(hostile), sides(hostile)
    assert time.process_time() - start < 5

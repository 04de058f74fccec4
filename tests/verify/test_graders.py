"""Agreement with math-verify, the think-tag and box rules, and the lenient letter rule for multiple choice."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thence.evaluate.choices import choices_of, find_letter, grade_letter
from thence.evaluate.problems import Problem
from thence.verify import Grade, GradeRequest, GradingPool, Verdict, load_reward
from thence.verify.boxed import last_boxed, normal_form
from thence.verify.math import Rule, graded_part

RIGHT, WRONG, UNKNOWN = Verdict.RIGHT, Verdict.WRONG, Verdict.UNKNOWN


@pytest.fixture(scope="module")
def pool() -> Iterator[GradingPool]:
    with GradingPool(workers=1) as pool:
        yield pool


# The official rule is math-verify's own.

PAIRS = [
    # gold, response, right?
    ("1/2", r"\boxed{\frac{1}{2}}", True),
    ("0.5", r"\boxed{\frac12}", True),
    (r"\frac{1}{3}", r"\boxed{0.333333}", True),
    (r"\frac{1}{3}", r"\boxed{0.33}", False),
    ("1,000", r"\boxed{1000}", True),
    ("1000", r"\boxed{1{,}000}", True),
    (r"50\%", r"\boxed{0.5}", True),
    (r"50\%", r"\boxed{50}", True),
    ("142.0", r"\boxed{142}", True),
    ("12", r"\boxed{12.5}", False),
    ("-3", r"\boxed{3}", False),
    ("(1,2)", r"\boxed{(1,2)}", True),
    ("(1,2)", r"\boxed{(2,1)}", False),
    ("(1,2)", r"\boxed{[1,2]}", False),
    (r"\{1,2\}", r"\boxed{\{2,1\}}", True),
    ("1,2", r"\boxed{1} and \boxed{2}", True),
    ("1,2", r"\boxed{1}", False),
    ("1<x<2", r"\boxed{(1,2)}", True),
    ("(1,2)", r"\boxed{1<x<2}", False),
    (r"x\ge 3", r"\boxed{[3,\infty)}", True),
    ("x=5", r"\boxed{5}", True),
    ("5", r"\boxed{x=5}", True),
    ("x^2+2x+1", r"\boxed{(x+1)^2}", True),
    (r"\sqrt{8}", r"\boxed{2\sqrt{2}}", True),
    (r"\frac{\sqrt{3}}{3}", r"\boxed{\frac{1}{\sqrt{3}}}", True),
    (r"\pi", r"\boxed{3.14159}", False),
    (r"90^\circ", r"\boxed{90}", True),
    ("5", r"\boxed{5\text{ cm}}", True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{bmatrix}1\\2\end{bmatrix}}", True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix}2\\1\end{pmatrix}}", False),
    ("1+2i", r"\boxed{2i+1}", True),
    (r"1.5\times 10^{3}", r"\boxed{1500}", True),
    (r"(-\infty,1)\cup(2,\infty)", r"\boxed{(2,\infty)\cup(-\infty,1)}", True),
    (r"\binom{5}{2}", r"\boxed{10}", True),
    (r"\text{east}", r"\boxed{east}", True),
    (r"\text{east}", r"\boxed{\text{west}}", False),
    ("18", "so she makes $18 a day.", True),
    ("18", r"first 7, then \boxed{18}, not 20", True),
    ("18", r"\boxed{7} no, \boxed{18}", False),
    ("5", "The answer is five.", False),
]


def test_verdicts_are_those_of_math_verify_with_its_defaults_gold_first(pool: GradingPool) -> None:
    from math_verify import parse, verify

    grades = pool.grade_many([GradeRequest(response, gold) for gold, response, _ in PAIRS])
    for (gold, response, expected), grade in zip(PAIRS, grades, strict=True):
        assert verify(parse(f"${gold}$"), parse(response)) is expected, (gold, response)
        assert grade.verdict is (RIGHT if expected else WRONG), (gold, response)


# Think tags and boxes: reward versions 3, 4 and 6.


def by_rule(pool: GradingPool, response: str, answer: str) -> dict[str, Verdict]:
    rules: tuple[Rule, ...] = ("after_think", "plain", "boxed")
    grades = pool.grade_many([GradeRequest(response, answer, rule) for rule in rules])
    return dict(zip(rules, (grade.verdict for grade in grades), strict=True))


@pytest.mark.parametrize(
    ("response", "after_think", "plain", "boxed"),
    [
        (r"hm</think>It is \boxed{4}.", RIGHT, RIGHT, RIGHT),
        (r"hm \boxed{4}", WRONG, RIGHT, RIGHT),  # cut off while thinking
        ("hm</think>It is $4$.", RIGHT, RIGHT, WRONG),  # no box
        (r"\boxed{4}</think>It is \boxed{5}.", WRONG, WRONG, WRONG),
        (r"a</think>\boxed{4}</think>\boxed{5}", RIGHT, WRONG, WRONG),  # the first part after thinking, or the last box
        (r"</think>\boxed{5}, no: \boxed{4}", WRONG, WRONG, RIGHT),  # two boxes are a set, or the last one counts
        (r"</think>\boxed{\frac{8}{2}}", RIGHT, RIGHT, RIGHT),
        (r"</think>\boxed{4", WRONG, WRONG, WRONG),  # the box is not closed
    ],
)
def test_the_rules_differ_in_what_they_look_at(
    pool: GradingPool, response: str, after_think: Verdict, plain: Verdict, boxed: Verdict
) -> None:
    expected = {"after_think": after_think, "plain": plain, "boxed": boxed}
    assert by_rule(pool, response, "4") == expected


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        (r"\text{Evelyn}", r"It is \boxed{Evelyn}"),
        (r"x_{0} \cos (\omega t)+$ $\dot{x}_{0}", r"\boxed{x_{0} \cos (\omega t)+$ $\dot{x}_{0}}"),
        (r"\frac{1}{2}", r"\boxed{\dfrac 12}"),
        ("4", r"\boxed 4"),
        ("50", r"\boxed{50\%}"),
    ],
)
def test_the_box_rule_takes_what_is_written_alike(pool: GradingPool, answer: str, response: str) -> None:
    assert by_rule(pool, response, answer)["boxed"] is RIGHT


@pytest.mark.parametrize(
    ("name", "expected"),
    [("math", [RIGHT, RIGHT]), ("math-after-think", [WRONG, RIGHT]), ("math-boxed", [RIGHT, WRONG])],
)
def test_rules_are_chosen_by_name(name: str, expected: list[Verdict]) -> None:
    with load_reward(name, workers=1) as grader:
        grades = grader.grade_many(["p"] * 2, [r"\boxed{4}", "</think>$4$"], ["4"] * 2)
    assert [grade.verdict for grade in grades] == expected


def test_without_a_gold_answer_no_rule_has_a_verdict(pool: GradingPool) -> None:
    rules: tuple[Rule, ...] = ("plain", "after_think", "boxed")
    grades = pool.grade_many([GradeRequest(r"</think>\boxed{4}", None, rule) for rule in rules])
    assert {grade.verdict for grade in grades} == {UNKNOWN}


def braced(parts: list[str]) -> str:
    return "{" + "".join(parts) + "}"


BRACES = st.recursive(st.text(alphabet="ab1 \\", max_size=5), lambda inner: st.lists(inner, max_size=3).map(braced))


@given(st.text(), BRACES, st.text(alphabet="ab }{"))
def test_the_last_box_is_found_with_all_its_braces(before: str, inside: str, after: str) -> None:
    assert last_boxed(f"{before}\\boxed{{{inside}}}{after}") == inside
    assert graded_part(f"{before}\\boxed{{{inside}}}{after}", "boxed") == f"\\boxed{{{inside}}}"


def test_the_box_rule_takes_no_time_on_hostile_text() -> None:
    start = time.monotonic()
    for hostile in (r"\boxed{" * 20_000, r"\boxed{" + "{" * 200_000, r"\boxed{" + " " * 200_000 + "}", "x=" * 100_000):
        last_boxed(hostile)
        normal_form(hostile)
    normal_form(r"\text{ " * 140)
    normal_form("(" * 1000)
    assert time.monotonic() - start < 2


# The lenient letter rule.

TEXT = "Which effect?\n\nA) Density will decrease.\nB) Years will become longer.\nC) Planetary days\nD) None of these"
PROBLEM = Problem("arc", "0" * 16, (("user", TEXT),), TEXT, "C")


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{C}",
        r"\boxed{\text{C}}",
        r"\boxed{C) Planetary days}",
        r"\boxed{\textbf{(C)}}",
        r"\boxed{\text{Planetary days}}",
        "ANSWER: C",
        "**Answer:** C",
        "Answer: $C$",
        "the answer is C) Planetary days, because",
        "The correct option is (C).",
        "The best choice would be C, I think.",
        r"The final answer is $\boxed{\mathrm{C}}$.",
        "A is not it. B is not it.\n\nC",
        "It spins faster.\n\n**C.**",
        "Days get shorter, so:\nC) Planetary days",
        "The answer is A.</think>The answer is C.",
        "The answer is A. No, the answer is C, since option A is wrong.",
    ],
)
def test_the_lenient_rule_finds_the_letter(response: str) -> None:
    assert grade_letter(PROBLEM, response) == Grade(RIGHT, 1.0, "C")


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("The answer is B.", "B"),
        (r"ANSWER: C... wait. \boxed{A}", "A"),
        ("Days will be shorter. A planet is a planet.", None),
        ("The answer is Cold.", None),
        ("C is a letter, and D too.", None),
        ("A) Density\nB) Years\nC) Planetary days", None),  # a list cut short is no answer
        ("The answer is E.", None),
        ("", None),
        ("The answer is C.</think>", None),
    ],
)
def test_the_lenient_rule_does_not_guess(response: str, found: str | None) -> None:
    grade = grade_letter(PROBLEM, response)
    assert (grade.verdict, grade.extracted) == (WRONG, found)
    assert bool(grade.reason) == (found is None)


def test_options_come_from_the_text_or_from_the_problem() -> None:
    assert list(choices_of(PROBLEM)) == ["A", "B", "C", "D"]
    digits = "How many?\n\n1) two\n2) 1.5 km\n3) four\n4) five\n"
    numbered = Problem("arc", "1" * 16, (), digits, "2")
    assert list(choices_of(numbered)) == ["1", "2", "3", "4"]
    assert grade_letter(numbered, r"\boxed{1.5 km}").extracted == "2"
    own = Problem("mmlu", "2" * 16, (), "Which?", "B", options=("R", "rr", "Rr"))
    assert choices_of(own) == {"A": "R", "B": "rr", "C": "Rr"}
    assert [find_letter(rf"\boxed{{{text}}}", choices_of(own)) for text in ("R", "rr", "Rr", "RR")] == [
        "A",
        "B",
        "C",
        None,
    ]
    listed = Problem("x", "3" * 16, (), "Steps:\n1) boil\n2) stir\nWhich is first?\n\nA) boiling\nB) stirring", "A")
    assert list(choices_of(listed)) == ["A", "B"]
    open_question = Problem("y", "4" * 16, (), "What is 2+2?", "4")
    assert grade_letter(open_question, "Answer: A").reason == "no options found in the problem"


@given(st.text(), st.sampled_from("ABCD"))
def test_any_text_before_the_statement_does_no_harm(noise: str, letter: str) -> None:
    assert find_letter(f"{noise}</think>Answer: {letter}", choices_of(PROBLEM)) == letter


def test_the_lenient_rule_takes_no_time_on_hostile_text() -> None:
    start = time.monotonic()
    for hostile in ("answer is " * 50_000, "answer" + " " * 200_000, "\n(" * 100_000, "A) " * 60_000):
        find_letter(hostile, choices_of(PROBLEM))
    assert time.monotonic() - start < 2

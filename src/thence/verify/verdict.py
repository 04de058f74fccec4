"""What a grader says about one response: right, wrong, graded or unknown, the number training uses, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any


class Verdict(Enum):
    """UNKNOWN means that nobody can tell (time limit, no gold answer ...). It is never counted as WRONG.

    GRADED means that the score is a degree and its reward function states no score from which a response is right:
    there is a mean reward then, and no accuracy.
    """

    RIGHT = "right"
    WRONG = "wrong"
    UNKNOWN = "unknown"
    GRADED = "graded"


@dataclass(frozen=True)
class Grade:
    """The grade of one response.

    Args:
        verdict: right, wrong, graded or unknown.
        score: what training uses; 1.0 for RIGHT and 0.0 else, except for own reward functions, which may return any
            number between -1e6 and 1e6. Always 0.0 for UNKNOWN.
        extracted: the text that was taken for the final answer, if one was found.
        components: what the score is made of, by name, where a reward function or several of them say so.
        reason: why a verdict is UNKNOWN or WRONG without comparison, and anything else worth knowing; else empty.
    """

    verdict: Verdict
    score: float
    extracted: str | None = None
    reason: str = ""
    components: tuple[tuple[str, float], ...] = ()


def right(extracted: str | None, reason: str = "") -> Grade:
    """A right answer, score 1.0."""
    return Grade(Verdict.RIGHT, 1.0, extracted, reason)


def wrong(extracted: str | None, reason: str = "") -> Grade:
    """A wrong answer, score 0.0."""
    return Grade(Verdict.WRONG, 0.0, extracted, reason)


def unknown(reason: str, extracted: str | None = None) -> Grade:
    """No verdict, score 0.0."""
    return Grade(Verdict.UNKNOWN, 0.0, extracted, reason)


def reward(grade: Grade) -> float:
    """The reward of a grade: its score. For answer checkers that is 1.0 for RIGHT and 0.0 for the other two."""
    return grade.score


def count(grades: Iterable[Grade]) -> dict[str, int]:
    """How many grades of each verdict. `right`, `wrong` and `unknown` are always there, `graded` only if there are."""
    found = Counter(grade.verdict for grade in grades)
    return {v.value: found[v] for v in Verdict if v is not Verdict.GRADED or found[v]}


def to_plain(grade: Grade) -> dict[str, Any]:
    """A grade as JSON values."""
    plain = asdict(grade) | {"verdict": grade.verdict.value}
    del plain["components"]  # of reward functions, which run elsewhere
    return plain


def from_plain(plain: dict[str, Any]) -> Grade:
    """The inverse of `to_plain`."""
    return Grade(Verdict(plain["verdict"]), plain["score"], plain["extracted"], plain["reason"])

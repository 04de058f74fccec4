"""Several rewards at once: their weighted sum, with the first one saying who is right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from thence.verify.grader import Grader
from thence.verify.verdict import Grade, Verdict, unknown


class WeightedGrader(Grader):
    """The weighted sum of several graders' scores.

    The verdict is that of the first, and so is the extracted answer. A response that one of them cannot judge is
    unknown. The components are each grader's own score, without its weight, and what that is made of.

    Args:
        graders: each with its weight, by the name under which its score is kept.
    """

    def __init__(self, graders: Mapping[str, tuple[float, Grader]]):
        self._graders = dict(graders)

    def grade_many(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        answers: Sequence[str | None],
        columns: Sequence[str] | None = None,
    ) -> list[Grade]:
        given = (prompts, responses, answers, columns)
        found = [grader.grade_many(*given) for _, grader in self._graders.values()]
        return [self._sum(grades) for grades in zip(*found, strict=True)]

    def close(self) -> None:
        for _, grader in self._graders.values():
            grader.close()

    def _sum(self, grades: Sequence[Grade]) -> Grade:
        for name, grade in zip(self._graders, grades, strict=True):
            if grade.verdict is Verdict.UNKNOWN:
                return unknown(f"{name}: {grade.reason}" if grade.reason else name, grades[0].extracted)
        weights = [weight for weight, _ in self._graders.values()]
        score = math.fsum(weight * grade.score for weight, grade in zip(weights, grades, strict=True))
        components: list[tuple[str, float]] = []
        for name, grade in zip(self._graders, grades, strict=True):
            components += [(name, grade.score), *((f"{name}/{part}", value) for part, value in grade.components)]
        first = grades[0]
        return Grade(first.verdict, score, first.extracted, first.reason, tuple(components))

"""What every grader is: it gives one grade for each response."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from thence.verify.verdict import Grade


class Grader(ABC):
    """Grades responses. A context manager; `close` ends all its processes."""

    @abstractmethod
    def grade_many(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        answers: Sequence[str | None],
        columns: Sequence[str] | None = None,
    ) -> list[Grade]:
        """One grade for each response, in order. The sequences are of one length (else ValueError).

        Args:
            columns: what else the row of each response holds, a JSON object as text, empty for none; None: not known.
        """

    def close(self) -> None:
        """Give up processes. May be called twice."""
        return

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

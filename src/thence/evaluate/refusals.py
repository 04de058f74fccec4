"""Requests that got no response, kept beside the samples: which, and why. They are asked again at the next start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from thence.errors import UserError
from thence.evaluate.store_lines import Whole, read_store_lines

ENOUGH = 5  # problems refused while none was answered


@dataclass(frozen=True, slots=True)
class Refusal:
    """One request without a response.

    Attributes:
        problem, sample: as of a `Sample`.
        question: of the problem, for readers.
        kind, reason: see `thence.evaluate.backends.Refused`.
        when: UTC.
    """

    problem: str
    sample: Whole
    question: str
    kind: str
    reason: str
    when: str

    @property
    def place(self) -> tuple[str, int]:
        """What names the request in its task."""
        return self.problem, self.sample


def refusals_path(folder: Path, task: str) -> Path:
    """Where the refusals of a task are kept in an evaluation's folder."""
    return folder / "refused" / f"{task}.jsonl"


def read_refusals(folder: Path, task: str, answered: Collection[tuple[str, int]]) -> dict[tuple[str, int], Refusal]:
    """The last refusal of each request that is not among the `answered`.

    A line that cannot be read is left out: its request counts as not made, and is made at the next start.
    """
    lines = read_store_lines(refusals_path(folder, task), Refusal, "it is left out; its request is repeated")
    found = {one.place: one for one in lines}
    return {place: one for place, one in found.items() if place not in answered}


def nothing_answered(reasons: Iterable[tuple[str, str]], folder: Path) -> UserError:
    """The error of an evaluation of which every request was refused.

    Args:
        reasons: (kind, reason) of each.
    """
    reasons = list(reasons)
    counts = Counter(reason for _, reason in reasons)
    shown = "; ".join(f"{reason} ({n} times)" if n > 1 else reason for reason, n in counts.most_common(3))
    kinds = {kind for kind, _ in reasons}
    remedy = "change what the server objects to"
    if kinds == {"too long"}:
        remedy = "use a model or server with a longer context, or lower --max-tokens"
    elif kinds == {"failed"}:
        remedy = "look at the server"
    return UserError(
        f"none of the first {len(reasons)} requests was answered: {shown}",
        remedy=f"{remedy}; then run the command again",
        file=folder,
    )

"""What is done with rows that cannot be used: an error that says where, or a counted list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from thence.errors import DataError

LISTED = 5


class RowProblem(Exception):
    """A row cannot be used. Raised where the row's place is not known; `error` or `bad_row` adds it.

    Args:
        field: the field at fault, None where the row as a whole is.
        problem: what is wrong.
        remedy: how to fix the row or the setting.
    """

    def __init__(self, field: str | None, problem: str, remedy: str):
        self.field, self.problem, self.remedy = field, problem, remedy
        super().__init__(problem)

    def error(self, source: str) -> DataError:
        """The error to raise for the row at `source` ("file:line")."""
        file, _, line = source.rpartition(":")
        if not (file and line.isdigit()):
            file, line = source, ""
        return DataError(
            self.problem,
            remedy=f"{self.remedy}; or leave such rows out with --data.skip-bad",
            file=file,
            line=int(line) if line else None,
            field=self.field,
        )

    def bad_row(self, source: str) -> BadRow:
        """The same as an entry in the list of rows left out."""
        return BadRow(source, self.field, self.problem)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was left out: its place ("file:line"), the field at fault (None: the whole row) and why."""

    source: str
    field: str | None
    problem: str

    def __str__(self) -> str:
        return f"{self.source}: {self.field}: {self.problem}" if self.field else f"{self.source}: {self.problem}"


def refuse_mostly_bad(name: str, good: int, bad: Sequence[BadRow], remedy: str) -> None:
    """Raise a `DataError` when more than half of the rows of `name` are bad: the settings are at fault then."""
    if len(bad) <= good:
        return
    listed = "".join(f"\n    {row}" for row in bad[:LISTED])
    more = f"\n    ... and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
    raise DataError(
        f"{len(bad)} of {good + len(bad)} rows are bad; more than half is refused even with skip-bad{listed}{more}",
        remedy=remedy,
        file=name,
    )

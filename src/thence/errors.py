"""Errors meant for the user: what is wrong, where, and what to do about it."""

from __future__ import annotations

from pathlib import Path

from thence.redaction import redacted


class UserError(Exception):
    """Something the user can fix. The command line prints it without a traceback and exits with 2.

    Passwords, tokens and keys are taken out of what it says, wherever it is then kept or printed.

    Args:
        problem: what is wrong, one sentence.
        remedy: what to do about it, one sentence.
        file: the file at fault, if one is.
        line: the line or row in that file, counted from 1.
        field: the field, column or flag at fault.

    Attributes:
        on_all_ranks: every rank of a run raises it, or another one for it: the first rank alone prints it.
    """

    on_all_ranks = False

    def __init__(
        self,
        problem: str,
        *,
        remedy: str,
        file: str | Path | None = None,
        line: int | None = None,
        field: str | None = None,
    ):
        self.problem, self.remedy = redacted(problem), redacted(remedy)
        self.file, self.line, self.field = (None if file is None else str(file)), line, field
        super().__init__(str(self))

    def rename_field(self, field: str) -> None:
        """Call the field as the user knows it, where the code that found the fault could not know the name."""
        self.field = field
        self.args = (str(self),)

    def __str__(self) -> str:
        place = redacted(self.file or "")
        if self.line is not None:
            place = f"{place}:{self.line}" if place else f"line {self.line}"
        if self.field is not None:
            place = f"{place}: {self.field}" if place else self.field
        head = f"{place}: {self.problem}" if place else self.problem
        return f"{head}\n  remedy: {self.remedy}"


class DataError(UserError):
    """A row or file of a data set that cannot be used."""


class RecipeError(UserError):
    """A recipe, or a flag that overrides it, that does not make sense."""


class CheckpointError(UserError):
    """A checkpoint that cannot be resumed from."""


class DamagedFile(UserError):
    """A file that thence wrote and that cannot be read any more. Nothing overwrites it."""


class StepRefused(UserError):
    """An optimizer step that would have harmed the model was not taken; the last checkpoint stands."""

    on_all_ranks = True  # it follows from sums over ranks


def first_line(error: BaseException) -> str:
    """What an error says in its first line, without secrets, or the name of its class where it says nothing."""
    return redacted((str(error).strip().splitlines() or [type(error).__name__])[0])

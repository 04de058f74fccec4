"""Command lines read with argparse, whose own exits are told apart from those of foreign code."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from thence.errors import UserError


class Done(Exception):
    """The help was printed, and there is nothing else to do."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises: UserError for what it cannot read, Done after the help."""

    def __init__(self, **options: Any):
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Refuse the command line. Raises UserError."""
        raise UserError(message, remedy=f"see `{self.prog} --help`")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End after the help. Raises Done."""
        if status:
            raise UserError((message or "the command line makes no sense").strip(), remedy=f"see `{self.prog} --help`")
        raise Done

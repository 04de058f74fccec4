"""Standard output and standard error as everything that prints gets them while a command runs.

Everything that thence or a library prints passes through :func:`thence.redaction.redacted` and
:func:`thence.foreign_text.clean`. What thence draws itself with colours (`terminal.py`) goes to the stream beneath,
after the same. A character that the terminal's encoding lacks is written out.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from thence.foreign_text import clean
from thence.redaction import redacted

_before: list[Callable[[], None]] = []


class OutputLost(OSError):
    """Standard output or standard error cannot be written: a closed pipe, a full disk."""


class Plain:
    """A text stream that writes what its encoding cannot say as escapes, and tells its own errors from others'."""

    def __init__(self, stream: TextIO, name: str):
        self.stream, self.name = stream, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text as it is. Raises OutputLost."""
        while _before:
            _before.pop()()
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding or "ascii"
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as error:
            raise OutputLost(error.errno, error.strerror, self.name) from error
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each. Raises OutputLost."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what is held back. Raises OutputLost."""
        try:
            self.stream.flush()
        except OSError as error:
            raise OutputLost(error.errno, error.strerror, self.name) from error

    def isatty(self) -> bool:
        """Whether a terminal shows it."""
        return self.stream.isatty()

    def fileno(self) -> int:
        """The number of the file beneath. Raises OSError where there is none."""
        return self.stream.fileno()


class Guarded(Plain):
    """The same for text from elsewhere: cleaned, and without secrets.

    Attributes:
        beneath: the stream for text that was cleaned already, and then coloured.
    """

    def __init__(self, stream: TextIO, name: str):
        super().__init__(stream, name)
        self.beneath = Plain(stream, name)

    def write(self, text: str) -> int:
        """Write a text with what a terminal would obey written out. Raises OutputLost."""
        # progress bars of libraries go back to the beginning of their line, before they write
        head = "\r" if text.startswith("\r") and self.isatty() else ""
        said = text[len(head) :].replace("\r\n", "\n")
        super().write(head + clean(redacted(said)))
        return len(text)


def before_next_output(act: Callable[[], None]) -> None:
    """Have something done once, before anything more is written to the guarded streams."""
    _before.append(act)


@contextmanager
def guarded() -> Iterator[None]:
    """Guard ``sys.stdout`` and ``sys.stderr`` for the time being."""
    before = sys.stdout, sys.stderr
    out, err = (stream if stream is not None else _nowhere() for stream in before)  # closed by who started us
    sys.stdout = Guarded(out, "standard output")  # type: ignore[assignment]
    sys.stderr = Guarded(err, "standard error")  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def give_up(stream: Any) -> None:
    """Send what is left in a stream that cannot be written nowhere, so that Python does not complain as it ends."""
    with suppress(OSError, ValueError, AttributeError, io.UnsupportedOperation):
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123 - for the life of the process

"""What a process printed: the lines that say something, and of these the one that says why it ended."""

from __future__ import annotations

import re
from collections.abc import Sequence

_BAR = re.compile(r"^.*?(?:\d+%\|.*?\|.*?|\d+(?:/\d+|it) )\[\d+:\d+[^\]]*\]")
"""A progress bar as tqdm draws it, with and without a total. It ends no line, so what follows may stand behind it."""
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_RANK = re.compile(r"^\[rank\d+\]:\s?")
_ERROR = re.compile(r"\s*[\w.]*(Error|Exception)\b")


def printed_lines(text: str) -> list[str]:
    """The lines of a log without empty ones, progress bars and what was printed over."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        parts = (_BAR.sub("", _COLOURS.sub("", part)).rstrip() for part in line.split("\r"))
        lines += [part for part in parts if part.strip()]
    return lines


def names_error(line: str) -> bool:
    """Whether a line names an exception, as a traceback ends with."""
    return _ERROR.match(_RANK.sub("", line)) is not None


def last_cause(lines: Sequence[str]) -> str | None:
    """Why a process ended: the end of its last traceback, or else its last line that names an exception."""
    found, inside = None, False
    for line in (_RANK.sub("", line) for line in lines):
        if line.startswith("Traceback (most recent call last)"):
            inside = True
        elif inside and not line[0].isspace():
            found, inside = line, False
    named = [line for line in lines if names_error(line)]
    return found or (_RANK.sub("", named[-1]) if named else None)

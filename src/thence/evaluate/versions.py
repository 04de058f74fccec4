"""What a grade depends on besides the response: the version of its grader."""

from __future__ import annotations

import hashlib
import importlib.metadata

from thence import __version__
from thence.errors import UserError
from thence.verify.loading import function_file
from thence.verify.math import RULES_VERSION

LETTER = "letter"
"""Name under which grades by the lenient letter rule are kept."""


def grader_version(grader: str, right_from: float | None = None) -> str:
    """What a grade by this grader depends on: the checker's version, or the text of the user's function.

    Args:
        right_from: the score from which a response is right, where it is not the function's own.

    Raises:
        UserError: there is no such function.
    """
    if ":" not in grader:
        if grader in ("exact", LETTER):
            return f"thence {__version__}"
        checker = importlib.metadata.version("math-verify")
        return f"thence {__version__}, rules {RULES_VERSION}, math-verify {checker}"
    file = function_file(grader)
    if file is None or not file.is_file():
        raise UserError(f"grader {grader} is not there", remedy="check the path or module", field="grader")
    return with_threshold(f"sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}", right_from)


def with_threshold(version: str, right_from: float | None) -> str:
    """The version of a function's grades where the score from which a response is right is not its own."""
    return version if right_from is None else f"{version}, right from {right_from:g}"

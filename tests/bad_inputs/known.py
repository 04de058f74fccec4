"""Faults of thence that the generator has found and that are not fixed yet: counted apart, and named.

An entry leaves this list with its fix; nothing else may fail.
"""

from __future__ import annotations

import re

KNOWN: dict[str, re.Pattern[str]] = {}


def known_fault(said: str, wrong: list[str]) -> str | None:
    """The fault that a failure shows; None: a new one."""
    text = f"{said}: {'; '.join(wrong)}"
    return next((name for name, pattern in KNOWN.items() if len(wrong) == 1 and pattern.fullmatch(text)), None)

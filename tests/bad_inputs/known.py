"""Faults of thence that the generator has found and that are not fixed yet: counted apart, and named.

An entry leaves this list with its fix; nothing else may fail.
"""

from __future__ import annotations

import re

KNOWN = {
    "thence eval on a table whose only row is an empty object: KeyError in data/layouts.py": re.compile(
        r"rows\.jsonl?: (object|a line b'\{\}'): blamed on thence"
    ),
    "a regrade that is refused for another damaged file has already rewritten the grades": re.compile(
        r"eval --regrade: .*: refused, but changed on disk: (eval/)?grades/[^,]*"
    ),
    "an evaluation whose model is refused leaves its new folder behind": re.compile(
        r"eval: run/stages/.*: refused, but changed on disk: eval/evaluation\.toml is new, eval/problems\.json is new"
    ),
}


def known_fault(said: str, wrong: list[str]) -> str | None:
    """The fault that a failure shows; None: a new one."""
    text = f"{said}: {'; '.join(wrong)}"
    return next((name for name, pattern in KNOWN.items() if len(wrong) == 1 and pattern.fullmatch(text)), None)

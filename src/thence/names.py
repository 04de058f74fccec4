"""Names that become files and folders: one rule for runs, stages, splits, suites, arms and tasks."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable

LONGEST = 100
RULE = f"use letters, digits and `._-+=,`, at most {LONGEST} bytes, and begin with a letter or digit"
_NAME = re.compile(r"[^\W](?:[\w.+=, -]*[\w+=])?")


def bad_name(name: str) -> str | None:
    """What is wrong with a name that becomes a file or folder; None where nothing is.

    A name never holds a separator, `..`, a control character or more bytes than a file system takes, so the path made
    of it stays inside its folder.
    """
    if not name:
        return "the name is empty"
    if (size := len(name.encode("utf-8", "surrogatepass"))) > LONGEST:
        return f"the name has {size:,} bytes"
    if not _NAME.fullmatch(name) or not name.isprintable():
        return f"{name!r} cannot name a file or folder"
    return None


def same_file(names: Iterable[str]) -> tuple[str, str] | None:
    """Two names that are one file where capitals do not count, as on macOS; None: each is its own."""
    seen: dict[str, str] = {}
    for name in names:
        folded = unicodedata.normalize("NFKC", name).casefold()
        if folded in seen:
            return seen[folded], name
        seen[folded] = name
    return None


def as_name(text: str) -> str:
    """A text as a name: other characters become dashes, and a long one is cut, its digest telling it apart."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "unnamed"
    if len(plain) <= LONGEST:
        return plain
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{plain[: LONGEST - 9].rstrip('-._')}-{digest}"

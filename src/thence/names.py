"""Names that become files and folders: one rule for runs, stages, splits, suites, arms and tasks."""

from __future__ import annotations

import re

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
    if len(name.encode("utf-8", "surrogatepass")) > LONGEST:
        return f"the name has {len(name.encode('utf-8', 'surrogatepass'))} bytes"
    if not _NAME.fullmatch(name) or not name.isprintable():
        return f"{name!r} cannot name a file or folder"
    return None

"""By what a run folder is known. Nothing here imports torch."""

from __future__ import annotations

import json
from pathlib import Path

MARKER = ".thence-run.json"


def is_run(folder: Path) -> bool:
    """Whether a folder is a run: it has the marker, or, of an older version, a recipe beside thence's environment."""
    if (folder / MARKER).is_file():
        return True
    try:
        facts = json.loads((folder / "environment.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    known = isinstance(facts, dict) and {"thence", "started"} <= facts.keys()
    return known and (folder / "recipe.toml").is_file()

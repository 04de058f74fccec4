"""What folders hold, and files of others in them."""

from __future__ import annotations

from pathlib import Path

THESIS = "ten years of work"


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def write(path: Path, text: str = THESIS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path

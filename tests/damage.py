"""Ways to damage a file, and what must be true of a refusal of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from thence.errors import DamagedFile

Damage = Callable[[bytes], bytes]


def conflict(content: bytes) -> bytes:
    lines = content.split(b"\n")
    middle = len(lines) // 2
    return b"\n".join([*lines[:middle], b"<<<<<<< HEAD", *lines[middle:]])


DAMAGE: dict[str, Damage] = {
    "cut": lambda content: content[: len(content) // 2],
    "flipped": lambda content: b"\x5b" + content[1:],
    "emptied": lambda content: b"",
    "conflict": conflict,
    "object": lambda content: b"{}",
    "number": lambda content: b"3",
    "list": lambda content: b"[]",
    "numbers": lambda content: b"[1, 2, 3]",
    "latin-1": lambda content: content[:5] + b"\xe9" + content[5:],
    "nested": lambda content: b"[" * 100_000,
    "zeros": lambda content: bytes(len(content)),
}
damaged = pytest.mark.parametrize("kind", DAMAGE)
sampled = pytest.mark.matrix(5)  # each case runs a command; five are quick


def harm(file: Path, kind: str) -> bytes:
    """Damage a file. Returns what it holds then."""
    content = DAMAGE[kind](file.read_bytes())
    file.write_bytes(content)
    return content


def refused(act: Callable[[], object], file: Path, kind: str) -> DamagedFile:
    """The act is refused with the file, with a line where there is one, and the file stays as it is."""
    content = file.read_bytes()
    with pytest.raises(DamagedFile) as caught:
        act()
    assert caught.value.file is not None and Path(caught.value.file).resolve() == file.resolve()
    assert caught.value.line is not None or kind not in ("conflict", "latin-1")
    assert caught.value.remedy and not caught.value.remedy.startswith(("remove", "delete", "--restart"))
    assert file.read_bytes() == content
    return caught.value

"""A bad input: what lies in an empty folder, the command given there, and how it ends."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

Prepare = Callable[[Path], object]


def nothing(here: Path) -> None:
    """An empty folder is enough."""


@dataclass(frozen=True)
class Case:
    """One bad input.

    Args:
        title: what is wrong, in a few words.
        command: as it is typed in the folder, without `thence`.
        prepare: puts what the command needs into the folder.
        code: expected exit code.
        base: the shared folder that is copied first: one of `shared.BASES`; empty: none.
        writes: the command begins its work before it meets the fault, and may write into a folder of its own (that of
            an evaluation is made before its model is opened or its server is asked).
        around: what goes on meanwhile (a server, a holder of a lock).
        process: run it in a process of its own, its standard output going to this file.
        remedy: the message says how to fix it.
    """

    title: str
    command: str
    prepare: Prepare = nothing
    code: int = 2
    base: str = ""
    writes: bool = False
    around: Callable[[Path], AbstractContextManager[object]] = field(default=lambda here: nullcontext())
    process: str = ""
    remedy: bool = True


def write(name: str, text: str | bytes) -> Prepare:
    """Write a file."""

    def prepare(here: Path) -> None:
        file = here / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())

    return prepare


def edit(name: str, change: Callable[[bytes], bytes]) -> Prepare:
    """Change a file's bytes. The name may be a pattern; the first match counts."""

    def prepare(here: Path) -> None:
        found = sorted(here.glob(name))
        assert found, f"no {name} in {sorted(map(str, here.rglob('*')))}"
        file = found[0]
        before = file.read_bytes()
        after = change(before)
        assert after != before, f"{name} stays as it was"
        file.write_bytes(after)

    return prepare


def swap(name: str, old: str, new: str) -> Prepare:
    """Replace a text in a file."""
    return edit(name, lambda content: content.replace(old.encode(), new.encode()))


def added(name: str, text: str) -> Prepare:
    """Add a text at the end of a file."""
    return edit(name, lambda content: content + text.encode())


def remove(name: str) -> Prepare:
    """Remove a file or folder."""

    def prepare(here: Path) -> None:
        for path in sorted(here.glob(name)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return prepare


def each(*steps: Prepare) -> Prepare:
    """One after the other."""

    def prepare(here: Path) -> None:
        for step in steps:
            step(here)

    return prepare


def marked(content: bytes) -> bytes:
    """A mark of an unresolved merge in the middle."""
    lines = content.split(b"\n")
    return b"\n".join([*lines[: len(lines) // 2], b"<<<<<<< HEAD", *lines[len(lines) // 2 :]])


def flipped(content: bytes) -> bytes:
    """One bit of the last byte but ten, as a failing disk leaves it."""
    return content[:-10] + bytes([content[-10] ^ 1]) + content[-9:]


def cut(content: bytes) -> bytes:
    """The first half."""
    return content[: len(content) // 2]

"""What a node has that results depend on, and whether it sees a folder: a program that prints it as JSON.

A node is given this file's text, so it also answers where thence is missing. Standard library only.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

PACKAGES = ("thence", "torch", "transformers", "tokenizers", "safetensors", "numpy")
"""Besides Python itself, what must be the same everywhere: numbers depend on it."""
SEES_AFTER = 15.0
"""Seconds in which a new file has come through a network drive, which may remember that it was not there."""


def software() -> dict[str, str]:
    """Python and packages with their versions, and a digest of thence's own files, whose version says less."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    found["files of thence"] = _digest_of_thence()
    return found


def hardware() -> dict[str, str]:
    """What last bits depend on and what may differ: the processor and the C compiler."""
    try:
        from thence.machine import cpu_name

        cpu = cpu_name()
    except ImportError:
        cpu = "not known"
    usual = (shutil.which(name) for name in ("cc", "gcc", "clang"))
    command, compiler = os.environ.get("CC") or next(filter(None, usual), ""), "none"
    if command:
        try:
            said = subprocess.run([*command.split(), "--version"], capture_output=True, text=True, timeout=20).stdout
            compiler = (said.splitlines() or ["none"])[0].strip()
        except (OSError, subprocess.SubprocessError):
            pass
    return {"processor": cpu, "C compiler": compiler}


def sees(probe: str, word: str, answer: str) -> str:
    """Whether this machine reads a word in a file and can write an answer beside it; says what is wrong, else nothing.

    Args:
        probe: a file that another machine has just written.
        word: what is in it.
        answer: the file to write.
    """
    until = time.monotonic() + SEES_AFTER
    while True:
        try:
            list(Path(probe).parent.iterdir())  # which makes a network drive look again
            if Path(probe).read_text(encoding="utf-8") == word:
                break
            wrong = "it sees another file there"
        except OSError as error:
            wrong = f"{error.strerror or error}"
        if time.monotonic() > until:
            return wrong
        time.sleep(0.25)
    try:
        Path(answer).write_text(word, encoding="utf-8")
    except OSError as error:
        return f"it cannot write there: {error.strerror or error}"
    return ""


def _digest_of_thence() -> str:
    found = importlib.util.find_spec("thence")
    if found is None or found.origin is None:
        return "missing"
    root, digest = Path(found.origin).parent, hashlib.sha256()
    for file in sorted(root.rglob("*")):
        if file.suffix in (".py", ".c", ".toml"):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def everything(probe: str = "", word: str = "", answer: str = "") -> dict[str, object]:
    """All of it at once, with the name of the machine; without a probe no folder is tried."""
    return {
        "software": software(),
        "hardware": hardware(),
        "host": platform.node(),
        "wrong": sees(probe, word, answer) if probe else "",
    }


if __name__ == "__main__":
    print(json.dumps(everything(*sys.argv[1:])))

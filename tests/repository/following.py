"""A page followed word for word, as a reader does: its files saved, its commands and its Python run, in order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests import ROOT
from tests.repository.blocks import blocks_of

_PIP = "--quiet --no-deps --no-build-isolation --no-index --disable-pip-version-check"


def follow(page: Path, folder: Path) -> tuple[Path, dict[str, str]]:
    """Follow a page in an empty folder.

    `thence` is the one of this checkout. `pip install` puts what the page has made where only these commands see it.

    Returns:
        Where the reader is at the end, and what each block printed, by its text.

    Raises:
        AssertionError: a command or a block of Python failed.
    """
    commands, installed = folder / "bin", folder / "installed"
    commands.mkdir()
    for name, call in (
        ("thence", '-m thence "$@"'),
        ("python", '"$@"'),
        ("pip", f'-m pip "$1" {_PIP} --target "{installed}" "$2"'),
    ):
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {call}\n')
        (commands / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'src'}:{installed}",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "80",
    }
    place, told = folder, {}
    for block in blocks_of(page):
        if block.mark == "file":
            (place / block.said).parent.mkdir(parents=True, exist_ok=True)
            (place / block.said).write_text(block.text)
        elif block.mark != "not run" and block.language in ("sh", "python"):
            script = f"set -e\n{block.text}\npwd > '{folder}/place'\n"
            command = ["bash", "-c", script] if block.language == "sh" else [sys.executable, "-c", block.text]
            done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{block.place}: {block.text}{done.stdout[-2000:]}{done.stderr[-2000:]}"
            told[block.text.strip()] = done.stdout
            if block.language == "sh":
                place = Path((folder / "place").read_text().strip())
    return place, told

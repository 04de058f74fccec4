"""The tutorial followed word for word: its files are saved, its commands and its Python are run, in order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.repository.blocks import blocks_of

PAGE = ROOT / "docs/tutorial.md"


@pytest.mark.slow
def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "thence").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m thence "$@"\n')
    (commands / "thence").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "80",
    }
    place, told = tmp_path, {}
    for block in blocks_of(PAGE):
        if block.mark == "file":
            (place / block.said).write_text(block.text)
        elif block.language == "sh" and block.mark != "not run":
            script = f"set -e\n{block.text}\npwd > '{tmp_path}/place'\n"
            done = subprocess.run(["bash", "-c", script], cwd=place, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{block.place}: {block.text}{done.stdout[-2000:]}{done.stderr[-2000:]}"
            place = Path((tmp_path / "place").read_text().strip())
            told[block.text.strip()] = done.stdout
        elif block.language == "python":
            done = subprocess.run(
                [sys.executable, "-c", block.text], cwd=place, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{block.place}: {done.stderr[-2000:]}"
            told["python"] = done.stdout

    assert place == tmp_path / "my-first-model"
    assert "report: runs/first-seed0/report.html" in told["thence run first.toml"]
    [longer] = [text for command, text in told.items() if "--rl.steps 12" in command]
    assert "sft 32/32" not in longer and "rl 12/12" in longer  # SFT is kept, RL goes on
    assert "B minus A on the same problems" in next(text for command, text in told.items() if "--compare" in command)
    assert (place / "runs/two/report.html").exists() and (place / "runs/first-seed0/report.html").exists()
    assert told["python"].startswith("[") and told["python"].count(",") == 3


def test_what_the_tutorial_shows_of_its_run_is_in_order() -> None:
    kinds = [(block.mark or block.language, block.said or block.text.split("\n")[0]) for block in blocks_of(PAGE)]
    names = [said for kind, said in kinds if kind == "file"]
    assert names == ["first.toml", "two.toml"]
    for name in names:  # saved before it is used
        used = next(place for place, (kind, said) in enumerate(kinds) if kind == "sh" and name in said)
        assert kinds.index(("file", name)) < used

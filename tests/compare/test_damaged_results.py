"""Results of a comparison that are damaged: refused with their place and a remedy, never overwritten."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests import ROOT
from tests.compare.comparisons import make_comparison
from tests.damage import damaged, harm, refused, sampled
from thence.cli import main
from thence.compare.result import RESULTS, read_results, results_json, write_results
from thence.toml import to_toml


@pytest.fixture
def comparison(tmp_path: Path) -> tuple[Path, list[str]]:
    """A folder with six runs' results and nothing else, and the command that reports it."""
    made = make_comparison({"sft": 0.0, "rl": 0.5}, seeds=3)
    named = tuple(replace(r, folder=f"runs/{r.arm}-{r.seed}") for r in made.runs)
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / RESULTS).write_text(results_json(replace(made, runs=named)))
    tables = {
        "name": "trial",
        "reference": "sft",
        "seeds": [0, 1, 2],
        "bases": {"rich": {"path": "world:chain/rich"}},
        "data": {"source": ["world:chain"]},
        "eval": {"reward": "exact"},
        "arms": {"sft": {"kind": "sft"}, "rl": {"kind": "rl"}},
    }
    (tmp_path / "c.toml").write_text(to_toml(tables))
    return folder, ["compare", str(tmp_path / "c.toml"), "--folder", str(folder)]


@sampled
@damaged
@pytest.mark.parametrize("flags", [["--report"], ["--dry-run"], []])
def test_damaged_results_are_never_overwritten(
    comparison: tuple[Path, list[str]], kind: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, command = comparison
    content = harm(folder / RESULTS, kind)
    assert main([*command, *flags]) == 2
    said = capsys.readouterr().err
    assert str(folder / RESULTS) in said and "Traceback" not in said and "put a whole copy" in said
    assert (folder / RESULTS).read_bytes() == content
    refused(lambda: write_results(folder, make_comparison({"sft": 0.0})), folder / RESULTS, kind)


def test_results_of_another_comparison_are_kept_beside_the_new_ones(comparison: tuple[Path, list[str]]) -> None:
    folder, command = comparison
    before = read_results(folder)
    main([*command, "--report"])  # other settings than those of the six runs
    assert len(read_results(folder).runs) == 0
    (folder / f"{RESULTS}.before-1").rename(folder / RESULTS)
    assert read_results(folder) == before


def test_the_study_is_not_judged_from_damaged_results_and_keeps_its_own(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "studies" / "embedded-world", tmp_path / "study")
    content = harm(tmp_path / "study" / RESULTS, "conflict")
    for arguments in ([], ["--kept", str(tmp_path / "new")]):
        done = subprocess.run(
            [sys.executable, str(tmp_path / "study" / "judge.py"), *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1 and f"{RESULTS}:" in done.stderr and "Traceback" not in done.stderr
        assert (tmp_path / "study" / RESULTS).read_bytes() == content
        assert not (tmp_path / "new" / RESULTS).exists()

"""Results of a comparison that are damaged: refused with their place and a remedy, never overwritten."""

from __future__ import annotations

import re
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
from thence.errors import DamagedFile
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


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ('"reference": "', '"reference": "no-', "reference"),
        ('"columns": [\n{"split":"', '"columns": [\n{"split":"no-', r"runs\[0\].measured"),
        ('"runs": [\n{"arm":"', '"runs": [\n{"arm":"no-', r"runs\[0\].arm"),
        ('"bases": ["', '"bases": ["no-', r"runs\[0\].base"),
        ('"right":[', '"right":[-1,', r"runs\[0\].measured"),
        ('"covariate": {}', '"covariate": {"arm":"sft","column":"no-set"}', "covariate"),
        ('"contrasts": []', '"contrasts": [{"name":"a","arm":"sft","other":["rl","no-arm"]}]', r"contrasts\[0\]"),
    ],
)
def test_results_that_name_what_they_do_not_hold_are_refused_with_the_field(
    comparison: tuple[Path, list[str]], old: str, new: str, field: str
) -> None:
    folder, _ = comparison
    text = (folder / RESULTS).read_text()
    assert old in text
    (folder / RESULTS).write_text(text.replace(old, new, 1))
    with pytest.raises(DamagedFile, match=r"changed by hand: .*(there is no|nothing was|lie between)") as refused_with:
        read_results(folder)
    assert re.fullmatch(field, refused_with.value.field or "")


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

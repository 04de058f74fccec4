"""Comparisons and audits write over nothing that is not their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import thence.compare.engine as engine
from tests.audit.made_reports import clean
from tests.compare.small import Quiet
from tests.compare.small import tables as comparison_tables
from tests.folders import THESIS, content, write
from thence.audit.run import stack
from thence.audit.run.stack import working_folder
from thence.cli import main
from thence.compare.engine import compare
from thence.compare.recipe import load_comparison
from thence.errors import UserError
from thence.toml import to_toml


@pytest.fixture
def comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A comparison whose runs are not run: each is reported as done, and none has left anything."""
    monkeypatch.setattr(engine._Going, "run_all", lambda self: iter(()))
    monkeypatch.setattr(engine, "refuse_what_cannot_run", lambda *_: None)
    return load_comparison({**comparison_tables(tmp_path), "folder": str(tmp_path / "p")})


@pytest.mark.parametrize("name", ["comparison.toml", "results.json", "report.html", "runs/thesis.txt", "summary.csv"])
def test_a_comparison_writes_over_nothing_of_others(name: str, comparison: Any, tmp_path: Path) -> None:
    write(tmp_path / "p" / name)
    before = content(tmp_path)
    with pytest.raises(UserError) as error:
        compare(comparison, watcher=Quiet())
    # results that cannot be read may be a comparison's own, so that is said of them
    said = "not valid JSON" if name == "results.json" else "is no comparison of thence"
    assert name.split("/")[0] in str(error.value) and said in str(error.value)
    assert content(tmp_path) == before
    assert not (tmp_path / "p" / ".lock").exists()


def test_the_users_own_comparison_file_in_the_folder_is_not_written_over(tmp_path: Path) -> None:
    text = "# mine\n" + to_toml({**comparison_tables(tmp_path), "folder": str(tmp_path / "p")})
    file = write(tmp_path / "p" / "comparison.toml", text)
    assert main(["compare", str(file)]) == 2
    assert main(["compare", str(file), "--report"]) == 2
    assert content(tmp_path / "p") == {"comparison.toml": text.encode()}


def test_a_comparison_beside_notes_and_one_with_kept_results_goes_on(comparison: Any, tmp_path: Path) -> None:
    notes = write(tmp_path / "p" / "README.md")
    compare(comparison, watcher=Quiet())
    (tmp_path / "p" / ".thence-comparison.json").unlink()  # a checkout of kept results, or an older version's folder
    compare(comparison, watcher=Quiet())
    assert notes.read_text() == THESIS


def test_what_an_audit_keeps_goes_into_a_folder_of_its_own(tmp_path: Path) -> None:
    precious = write(tmp_path / "p" / "case-0" / "thesis.txt")
    with pytest.raises(UserError, match="holds other things: case-0"), working_folder(tmp_path / "p"):
        pass
    assert precious.read_text() == THESIS
    with pytest.raises(UserError, match="a file, not a folder"), working_folder(precious):
        pass
    for _ in range(2):
        with working_folder(tmp_path / "new") as folder:
            (folder / "case-0").mkdir(exist_ok=True)


@pytest.mark.parametrize("kind", ["json", "html", "junit"])
def test_an_audits_report_takes_the_place_of_an_earlier_one_alone(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stack, "audit_stack", lambda target, **settings: clean())
    mine = write(tmp_path / "train.py")
    assert main(["audit", "thence", "--quick", f"--{kind}", str(mine)]) == 2
    assert f"--{kind}: the file is there already" in capsys.readouterr().err
    assert mine.read_text() == THESIS
    arguments = ["thence", "--quick", "--quiet", "--only", "micro 8 x 1", f"--{kind}", str(tmp_path / "report")]
    first = main(["audit", *arguments])
    assert first == clean().verdict.exit_code and (tmp_path / "report").stat().st_size
    assert main(["audit", *arguments]) == first  # its own report may be replaced


def test_two_reports_of_an_audit_do_not_share_a_file(tmp_path: Path) -> None:
    file = str(tmp_path / "report")
    assert main(["audit", "thence", "--json", file, "--junit", file]) == 2
    assert main(["audit", "thence", "--json", str(tmp_path)]) == 2

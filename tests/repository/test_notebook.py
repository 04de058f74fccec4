"""The notebook runs as it stands, and holds nothing but what was written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT

NOTEBOOK = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_no_output_of_a_machine_is_kept() -> None:
    assert all(
        not cell["outputs"] and cell["execution_count"] is None for cell in NOTEBOOK["cells"] if "outputs" in cell
    )


@pytest.mark.slow
def test_the_cells_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for text in CODE:
        exec(compile(text, "quickstart.ipynb", "exec"), names)
    results = names["run"].results
    assert list(results["subject"].unique()) == ["base", "sft", "rl"]
    assert set(names["samples"]["verdict"]) <= {"right", "wrong", "unknown"}
    assert len(names["metrics"]) > 4 and (tmp_path / "runs/notebook/report.html").is_file()

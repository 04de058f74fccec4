"""docs/trust.md says what docs/trust.toml and the kept figures say, and names tests that are there."""

from __future__ import annotations

import ast
import json
import sys
import tomllib
from pathlib import Path

import pytest

from tests import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import trust_page

PARTS = tomllib.loads((ROOT / "docs/trust.toml").read_text())["part"]
PROMISES = [promise for part in PARTS for promise in part["promise"]]


def _tests_in(file: Path) -> set[str]:
    body = ast.parse(file.read_text()).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_test_that_the_page_names_is_there() -> None:
    missing = []
    for file, name in sorted({tuple(test.split("::")) for promise in PROMISES for test in promise["tests"]}):
        path = ROOT / "tests" / file
        if not path.exists() or name not in _tests_in(path):
            missing.append(f"{file}::{name}")
    assert not missing


def _is_for_test_all_alone(file: Path, name: str) -> bool:
    node = next(n for n in ast.parse(file.read_text()).body if isinstance(n, ast.FunctionDef) and n.name == name)
    return any(ast.unparse(mark) == "pytest.mark.everything" for mark in node.decorator_list)


def test_make_test_runs_a_test_of_every_promise() -> None:
    for promise in PROMISES:
        tests = [test.split("::") for test in promise["tests"]]
        left = [name for file, name in tests if not _is_for_test_all_alone(ROOT / "tests" / file, name)]
        assert left or not tests, promise["says"]


def test_every_promise_has_a_test_or_a_figure_and_is_one_sentence() -> None:
    assert len(PROMISES) >= 18
    for promise in PROMISES:
        assert promise["tests"] or "figure" in promise, promise["says"]
        assert promise["says"].endswith(".") and ". " not in promise["says"], promise["says"]


def test_the_page_is_what_the_script_writes() -> None:
    written = (ROOT / "docs/trust.md").read_text()
    assert written == trust_page.page(PARTS, ROOT / "benchmarks/results"), "run `make trust`"


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        (None, "not measured yet"),
        ({"kills": 2000, "cases": {"run": 7}, "date": "2026-01-02T03"}, "2,000 kills, 7 of run (FILE, 2026-01-02)"),
        ({"kills": 3, "peak": 1.5, "told": ["x"]}, "kills: 3, peak: 1.5 (FILE)"),
    ],
)
def test_a_figure_is_read_from_its_file(tmp_path: Path, figures: dict | None, words: str) -> None:
    if figures is not None:
        (tmp_path / "k.json").write_text(json.dumps(figures))
    promise = {"figure": "k.json", "measured": "{kills} kills, {cases.run} of run"}
    assert trust_page.measured(promise, tmp_path) == words.replace("FILE", "`benchmarks/results/k.json`")

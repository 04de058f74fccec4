"""The plans that the pages show are those of `thence run --dry-run` now."""

from __future__ import annotations

import importlib.util
import shlex
from itertools import pairwise

import pytest

from tests import ROOT
from tests.repository.blocks import blocks_of
from thence.cli import main

PAGE = ROOT / "docs/seven-b.md"
BLOCKS = blocks_of(PAGE)
PLANS = [
    (command.text, shown.text)
    for command, shown in pairwise(BLOCKS)
    if "--dry-run" in command.text and shown.language == "text"
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "shown"), PLANS, ids=["as shipped", "fewer rows"])
def test_the_layouts_on_the_page_are_those_of_a_dry_run(
    command: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    main(shlex.split(command)[1:])  # its exit code says that the data are not here
    assert shown in capsys.readouterr().out


def test_the_tables_on_the_page_of_scale_are_those_of_their_script() -> None:
    spec = importlib.util.spec_from_file_location("scale_plan", ROOT / "benchmarks/scale_plan.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = script.PAGE.read_text()
    assert all(f"<!-- {name} -->\n| " in text for name in script.TABLES)
    assert script.filled(text) == text, "run `python benchmarks/scale_plan.py --write`"

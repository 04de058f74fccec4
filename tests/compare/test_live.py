"""What a terminal shows of a comparison while it runs."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.compare.small import tables
from thence.compare.live import LiveTable, title
from thence.compare.plan import Planner
from thence.compare.recipe import load_comparison
from thence.terminal import make_console


def shown(live: LiveTable, width: int) -> str:
    console = make_console(width=width)
    with console.capture() as captured:
        console.print(live.live.get_renderable())
    return captured.get()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_what_goes_on_stands_above_the_table_and_nothing_is_cut(tmp_path: Path, width: int) -> None:
    live = LiveTable(make_console(file=io.StringIO(), width=width, force_terminal=True), 2)
    assert shown(live, width) == "trying what the comparison names ...\n"
    comparison = load_comparison(tables(tmp_path))
    planner = Planner(comparison, tmp_path / "comparison")
    runs = [run for run in planner.runs() if run.arm]
    live.begin(planner, runs)
    jobs: list[Any] = [SimpleNamespace(run=run) for run in runs[:3]]
    live.started(jobs[0])
    live.started(jobs[1])
    live.progress(jobs[1], "sft", 26, 34)
    live.progress(jobs[2], "sft-pretrain", 1_000, 200_000)
    live.failed(replace(runs[3]), "no memory")
    text = shown(live, width)
    lines = " ".join(text.split())
    assert f"tiny: 0 of {len(runs)}" in lines and "… " not in lines
    assert f"{title(runs[0])} starting" in lines
    assert "sft 26 of 34" in lines and "sft-pretrain 1,000" in lines and "200,000" not in lines
    assert lines.index("starting") < lines.index("arm small") and "1 failed" in lines
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert all(arm in lines for arm in comparison.arms if any(run.arm == arm for run in runs))


def test_with_many_bases_the_table_has_tuning_and_blocks(tmp_path: Path) -> None:
    own = tables(tmp_path)
    recipe = str(tmp_path / "base.toml")
    own["bases"] = {"tuned": {"recipe": recipe, "seeds": []}}
    own["bases"] |= {f"b{i:02d}": {"recipe": recipe, "seeds": [0], "tuned_on": "tuned"} for i in range(24)}
    planner = Planner(load_comparison(own), tmp_path / "comparison")
    live = LiveTable(make_console(file=io.StringIO(), width=80, force_terminal=True), 2)
    live.begin(planner, list(planner.runs()))
    live.ended |= {run for run in live.runs if run.arm == "sft" and run.base in ("b00", "b01", "tuned")}
    live.started(SimpleNamespace(run=live.runs[0]))  # type: ignore[arg-type]
    rows = {line.split()[0]: line.split()[1:] for line in shown(live, 80).splitlines() if line.strip()}
    assert rows["arm"] == ["tuning", "24", "blocks"]
    assert rows["sft"] == ["2/2", "2/24"] and rows["rl"] == ["0/24"] and rows["pretraining"] == ["0/1", "0/24"]
    assert max(len(line.rstrip()) for line in shown(live, 80).splitlines()) <= 80

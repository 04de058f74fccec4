"""A run says its plan before it starts, and ends with what it planned beside what it measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from thence.cli import main
from thence.pipeline import foreseen
from thence.pipeline.foreseen import FORESEEN, Compared, compared

GIVEN = ["--stages", '["sft", "rl"]', "--data.limit", "16", "--sft.steps", "5", "--sft.batch", "4", "--folder", "run"]
GIVEN += ["--rl.steps", "2", "--rl.prompts", "4", "--rl.rollouts", "4", "--rl.max-tokens", "24"]


@pytest.fixture(autouse=True)
def anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def by_name(found: list[dict[str, Any]], stage: str) -> dict[str, dict[str, Any]]:
    return {each["quantity"]: each for each in found if each["stage"] == stage}


def test_a_program_is_told_the_plan_and_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstart", *GIVEN, "--json"]) == 0
    found = events(capsys.readouterr().out)
    kinds = [event["event"] for event in found]
    assert kinds.index("begin") < kinds.index("planned") < kinds.index("stage")
    assert kinds[-2:] == ["measured", "done"]
    planned = found[kinds.index("planned")]
    assert planned["stages"] == ["sft", "rl"] and planned["peak"] > 0
    sft = by_name(found[-2]["compared"], "sft")
    low, high = sft["rule_flops"]["planned"]
    assert low == high and sft["rule_flops"]["measured"] == pytest.approx(high, rel=0.2), "rows differ from their mean"
    assert sft["exact_flops"]["measured"] == pytest.approx(sft["exact_flops"]["planned"][1], rel=0.2)
    assert sft["peak"]["measured"] > 0
    assert sft["seconds"]["measured"] > 0, "five steps, foreseen from the first three"
    rl = by_name(found[-2]["compared"], "rl")
    assert "seconds" not in rl, "two steps let nothing be foreseen"
    assert rl["generated_tokens"]["measured"] > 0


def test_a_person_reads_one_line_before_and_a_table_after(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstart", *GIVEN]) == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("plan: ")]
    assert "FLOPs by the rule" in line and "tokens trained" in line and "on a rank at most (one rank)" in line
    assert printed.index("plan: ") < printed.index("sft: 5 steps") < printed.index("Planned and measured")
    assert "time, by its first 3 steps" in printed
    # a run that is done has nothing to plan, and its plan stays
    kept = Path("run", FORESEEN).read_text()
    assert main(["run", "quickstart", *GIVEN]) == 0
    assert "plan: " not in capsys.readouterr().out and Path("run", FORESEEN).read_text() == kept


def test_a_run_does_not_fail_for_its_plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("no plan")

    monkeypatch.setattr(foreseen, "plan", broken)
    assert main(["run", "quickstart", *GIVEN, "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "" and "no plan was made: no plan" in printed.err
    assert not Path("run", FORESEEN).exists()


@pytest.mark.parametrize("text", ["", "[]", '{"sft": 3}', '{"sft": {"rule_flops": "x", "peak": null}}'])
def test_a_damaged_file_of_the_plan_is_passed_over(text: str, tmp_path: Path) -> None:
    (tmp_path / FORESEEN).write_text(text)
    assert all(isinstance(each, Compared) for each in compared(tmp_path))

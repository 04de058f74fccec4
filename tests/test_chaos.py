"""A short campaign of kills, and that the campaign sees a command that loses something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.chaos.results import differences, left_over, results_of  # noqa: E402

pytestmark = pytest.mark.slow
FORGETFUL = "from thence.pipeline.folder import RunFolder\nRunFolder.rewind = lambda *given, **named: None\n"
"""A thence that keeps the lines of steps which it takes a second time."""


def campaign(out: Path, *arguments: str, before: str = "") -> tuple[int, dict[str, Any]]:
    """Run a campaign in a process of its own, which forks. Returns its exit code and what it wrote."""
    code = f"import sys\n{before}from tests.chaos.campaign import main\nsys.exit(main(sys.argv[1:]))"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--out", str(out)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        timeout=500,
    )
    assert out.exists(), done.stderr[-3000:]
    return done.returncode, json.loads(out.read_text())


def test_commands_that_are_killed_end_as_if_nobody_had_killed_them(tmp_path: Path) -> None:
    only = [part for name in ("run", "run-relift", "eval") for part in ("--only", name)]
    code, told = campaign(tmp_path / "kills.json", "--kills", "9", "--seed", "1", *only)
    failed = [case for case in told["tried"] if not case["holds"]]
    assert not failed, json.dumps(failed, indent=1)[-4000:]
    assert code == 0 and told["kills"] >= 6
    assert {case["scenario"] for case in told["tried"]} == {"run", "run-relift", "eval"}


def test_the_campaign_sees_a_run_that_writes_its_steps_twice(tmp_path: Path) -> None:
    code, told = campaign(
        tmp_path / "kills.json", "--kills", "4", "--seed", "2", "--only", "run-relift", before=FORGETFUL
    )
    assert code == 1
    assert any("metrics.jsonl: differs" in case["differences"] for case in told["tried"])


def test_a_result_that_differs_is_missing_or_is_too_much_is_named(tmp_path: Path) -> None:
    for name, loss in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"loss": loss, "seconds": loss}) + "\n")
    (tmp_path / "b" / "results.json").write_text("{}")
    calm, killed = results_of(tmp_path / "a"), results_of(tmp_path / "b")
    assert differences(calm, killed) == ["metrics.jsonl: differs", "results.json: too much"]
    assert differences(killed, calm) == ["metrics.jsonl: differs", "results.json: missing"]
    assert differences(calm, calm) == []


def test_temporary_files_that_stay_are_named(tmp_path: Path) -> None:
    checkpoints = tmp_path / "stages" / "rl" / "checkpoints"
    for name in ("step-000001", "step-000002", ".writing-000003"):
        (checkpoints / name).mkdir(parents=True)
    (tmp_path / ".lock").write_text("")
    assert left_over(tmp_path) == ["stages/rl/checkpoints/.writing-000003", "stages/rl/checkpoints/step-000001"]
